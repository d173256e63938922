"""Random works, pools and troubles: every work ends, its output is as if it were alone, no block is lost or shared wrongly."""

from dataclasses import dataclass, field
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from decode_worker.events import BlocksReserved, SequencesStarted, WorkEnded, WorkFailed
from decode_worker.push_permits import PushPermit, PushPermits
from decode_worker.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.speculation import SpeculationLimits
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.work import FailureKind, Work, WorkId
from tests.simulated_pool import MODEL, SimulatedPool, expected_output, make_token
from tests.works import make_work

MAX_STEPS = 3000

PROMPTS = [[7] * 30, list(range(5, 35)), [7] * 8 + list(range(9, 31))]


ACTIONS = ("new", "new", "begin", "begin", "end", "end", "run", "step", "step", "step", "cancel", "fail", "finish")


def random_works(random: Random) -> list[Work]:
    return [
        make_work(
            random.choice(PROMPTS)[: random.randint(1, 30)],
            random.choice([random.randint(1, 12), random.randint(12, 32)]),
            request_id=f"{number:032x}",
            num_sequences=random.choice([1, 1, 1, 2, 3]),
            cache_salt=random.choice(["", "other"]),
            runs_alone=random.random() < 0.2,
        )
        for number in range(random.randint(1, 8))
    ]


def random_speculation(random: Random) -> SpeculationLimits | None:
    if random.random() < 0.4:
        return None
    return SpeculationLimits(random.randint(1, 8), random.randint(2, 20), MODEL.max_context_tokens)


@dataclass
class Simulation:
    """A scheduler with everything around it."""

    scheduler: DecodeScheduler
    blocks: BlockManager
    pool: SimulatedPool
    permits: PushPermits
    works: dict[WorkId, Work]
    reserved: dict[WorkId, tuple[tuple[int, ...], int, bytes]] = field(default_factory=dict)
    pushes: dict[WorkId, PushPermit] = field(default_factory=dict)
    outputs: dict[tuple[WorkId, int], list[int]] = field(default_factory=dict)
    ended: dict[WorkId, WorkEnded | WorkFailed] = field(default_factory=dict)
    given_up: set[WorkId] = field(default_factory=set)
    finished_early: set[tuple[WorkId, int]] = field(default_factory=set)
    alone: WorkId | None = None
    """The last that was reserved for running alone."""

    def take_events(self) -> None:
        for event in self.scheduler.take_events():
            match event:
                case BlocksReserved(work, block_ids, num_cached_tokens):
                    self.pool.check(block_ids, work.token_ids, num_cached_tokens)
                    ticket = self.permits.open(work, block_ids, num_cached_tokens)
                    self.reserved[work.work_id] = (block_ids, num_cached_tokens, ticket)
                    if work.runs_alone:
                        assert self.alone is None or self._is_over(self.alone), "two that run alone"
                        self.alone = work.work_id
                case WorkEnded(work_id) | WorkFailed(work_id):
                    assert work_id not in self.ended, "two ends"
                    assert work_id not in self.pushes, "ended under a writer"
                    self.ended[work_id] = event
                case SequencesStarted():
                    pass
        self.blocks.check_integrity()

    def begin_push(self, work_id: WorkId) -> None:
        if work_id in self.reserved:
            self.pushes[work_id] = self.permits.begin(work_id, self.reserved.pop(work_id)[2], lambda: None)

    def end_push(self, work_id: WorkId, succeeds: bool) -> None:
        permit = self.pushes.pop(work_id, None)
        if permit is None:
            return
        work = permit.work
        # Even a writer that has been told to stop may have written up to now.
        self.pool.write(permit.block_ids, work.token_ids, permit.token_begin, permit.token_end)
        self.permits.end(permit)
        tokens = [make_token(work, number, work.token_ids) for number in work.sequences] if succeeds else None
        if tokens and work_id not in self.given_up and work_id not in self.ended:
            for token in tokens:
                self.outputs.setdefault((work_id, token.sequence), []).append(token.token.token_id)
        self.scheduler.push_ended(work_id, tokens, "broken")
        self.take_events()

    def run_prompt(self, work_id: WorkId) -> None:
        if self.reserved.pop(work_id, None) is not None:
            self.scheduler.run_prompt(work_id)
            self.take_events()

    def step(self) -> bool:
        step = self.scheduler.schedule()
        self.take_events()
        if step is None:
            return False
        if self.alone is not None and not self._is_over(self.alone):
            assert set(step.work_ids) == {self.alone}, "something beside a work that runs alone"
        tokens = self.pool.run(step)
        for token in tokens:
            output = self.outputs.setdefault((token.work_id, token.sequence), [])
            assert token.index == len(output), "a token index twice or missing"
            output.append(token.token.token_id)
        self.scheduler.complete(step, tokens)
        self.take_events()
        return True

    def _is_over(self, work_id: WorkId) -> bool:
        """Whether prompt and first decode step of a work are computed, or nobody wants them."""
        sequences = {(work_id, number) for number in self.works[work_id].sequences} - self.finished_early
        is_computed = all(len(self.outputs.get(sequence, [])) >= 2 for sequence in sequences)
        return is_computed or work_id in self.given_up or work_id in self.ended

    def drain(self) -> None:
        """Everything that is outside of the scheduler's hands ends; then the scheduler has to end all works."""
        for number in range(MAX_STEPS):
            if self.scheduler.num_works == 0:
                return
            progressed = self.step()
            for work_id in list(self.pushes):
                self.end_push(work_id, True)
                progressed = True
            for work_id in list(self.reserved):
                if number % 2:
                    self.run_prompt(work_id)
                else:
                    self.begin_push(work_id)
                progressed = True
            assert progressed or self.scheduler.num_works == 0, "stuck"
        raise AssertionError("works do not end")


def act(simulation: Simulation, action: str, work_id: WorkId, coming: list[Work], random: Random) -> None:
    """One thing that gateways, pushes or the engine do."""
    scheduler = simulation.scheduler
    if action in ("cancel", "fail", "finish") and (random.random() < 0.6 or work_id not in scheduler.work_ids()):
        return
    match action:
        case "new" if coming:
            scheduler.reserve(coming.pop())
        case "begin":
            simulation.begin_push(work_id)
        case "end":
            simulation.end_push(work_id, random.random() < 0.7)
        case "run":
            simulation.run_prompt(work_id)
        case "step":
            simulation.step()
        case "cancel" | "fail":
            simulation.given_up.add(work_id)
            simulation.reserved.pop(work_id, None)
            if action == "cancel":
                scheduler.cancel(work_id)
            else:
                scheduler.fail(work_id, FailureKind.DEADLINE, "late")
        case "finish":
            simulation.finished_early.add((work_id, 0))
            scheduler.finish_sequence(work_id, 0)
            if simulation.works[work_id].num_sequences == 1:
                simulation.reserved.pop(work_id, None)
    simulation.take_events()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=400, deadline=None, phases=[Phase.generate])
def test_all_works_end_with_their_own_tokens_whatever_happens(seed: int) -> None:
    random = Random(seed)
    works = random_works(random)
    num_blocks, block_size = random.randint(2, 24), random.randint(1, 5)
    blocks = BlockManager(num_blocks, block_size, random.random() < 0.7)
    permits = PushPermits()
    limits = DecodeLimits(random.randint(1, 20), random.randint(3, 8), 100, random.choice([None, 1, 3]))
    scheduler = DecodeScheduler(blocks, limits, permits, random_speculation(random))
    pool = SimulatedPool(num_blocks, block_size)
    simulation = Simulation(scheduler, blocks, pool, permits, {work.work_id: work for work in works})
    coming = list(works)
    for _ in range(random.randint(0, 80)):
        act(simulation, random.choice(ACTIONS), random.choice(works).work_id, coming, random)
    for work in coming:
        scheduler.reserve(work)
    simulation.take_events()
    simulation.drain()
    check_end(simulation)


def check_end(simulation: Simulation) -> None:
    assert simulation.blocks.num_used_blocks == 0
    assert len(simulation.permits) == 0
    assert simulation.scheduler.load().num_running == simulation.scheduler.load().num_waiting == 0
    for work_id, work in simulation.works.items():
        if work_id in simulation.given_up or isinstance(simulation.ended[work_id], WorkFailed):
            continue
        for number in work.sequences:
            output = simulation.outputs.get((work_id, number), [])
            expected = expected_output(work, number)
            if (work_id, number) in simulation.finished_early:
                assert output == expected[: len(output)]
            else:
                assert output == expected


def test_two_works_that_do_not_fit_together_both_end() -> None:
    """A pool for one and a half: each needs 8 of 12 blocks in the end."""
    blocks = BlockManager(12, 2, enable_prefix_cache=False)
    permits = PushPermits()
    works = [make_work(list(range(10 * n + 5, 10 * n + 13)), 8, request_id=f"{n:032x}") for n in range(2)]
    scheduler = DecodeScheduler(blocks, DecodeLimits(8, 8, 8), permits)
    simulation = Simulation(scheduler, blocks, SimulatedPool(12, 2), permits, {work.work_id: work for work in works})
    for work in works:
        scheduler.reserve(work)
    simulation.take_events()
    for work in works:
        simulation.run_prompt(work.work_id)
    simulation.drain()
    check_end(simulation)
    assert scheduler.load().num_preemptions > 0
    # The younger one gave way.
    assert list(simulation.ended) == [work.work_id for work in works]


def test_guesses_save_steps_and_change_no_token() -> None:
    works = [make_work(prompt[:20], 40, request_id=f"{n:032x}", num_sequences=2) for n, prompt in enumerate(PROMPTS)]
    num_steps = []
    for speculation in (None, SpeculationLimits(8, 40, MODEL.max_context_tokens)):
        blocks, permits = BlockManager(120, 4), PushPermits()
        scheduler = DecodeScheduler(blocks, DecodeLimits(64, 8, 8), permits, speculation)
        simulation = Simulation(scheduler, blocks, SimulatedPool(120, 4), permits, {work.work_id: work for work in works})
        for work in works:
            scheduler.reserve(work)
        simulation.take_events()
        for work in works:
            simulation.run_prompt(work.work_id)
        steps = 0
        while simulation.step():
            steps += 1
        num_steps.append(steps)
        check_end(simulation)
    load = scheduler.load()
    assert load.num_accepted_tokens > 50
    assert load.num_drafted_tokens > load.num_accepted_tokens, "none was wrong: the test shows nothing of those"
    assert num_steps[1] < num_steps[0]
