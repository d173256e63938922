"""Prefill scheduler: single rules by name, and a simulation in which everything that can happen does."""

from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.work import FailureKind, Work, WorkId
from prefill_worker.events import Event, PromptComputed, PromptStarted, SendingStopped, WorkEnded, WorkFailed
from prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from tests.simulated_pool import MODEL, SimulatedPool, expected_output
from tests.works import make_work


class Bench:
    """A scheduler over a simulated pool, with senders that check what they would send."""

    def __init__(self, num_blocks: int = 16, block_size: int = 4, chunk: int = 8, waiting: int = 100, cache: bool = True) -> None:
        self.blocks = BlockManager(num_blocks, block_size, cache)
        self.scheduler = PrefillScheduler(self.blocks, MODEL, PrefillLimits(chunk, waiting))
        self.pool = SimulatedPool(num_blocks, block_size)
        self.senders: dict[WorkId, PromptStarted] = {}
        self.stopped: set[WorkId] = set()
        self.computed: dict[WorkId, PromptComputed] = {}
        self.ended: dict[WorkId, Event] = {}

    def take_events(self) -> list[Event]:
        events = self.scheduler.take_events()
        for event in events:
            match event:
                case PromptStarted(work) if event.sends_kv:
                    self.senders[work.work_id] = event
                case PromptComputed(work_id):
                    self.computed[work_id] = event
                case SendingStopped(work_id):
                    self.stopped.add(work_id)
                case WorkEnded(work_id) | WorkFailed(work_id):
                    assert work_id not in self.senders, "ended under a sender"
                    assert work_id not in self.ended, "two ends"
                    self.ended[work_id] = event
        self.blocks.check_integrity()
        return events

    def step(self) -> list[int]:
        """The sizes of the step's entries; empty when there is nothing to compute."""
        step = self.scheduler.schedule()
        self.take_events()
        if step is None:
            return []
        assert all(entry.num_tokens > 0 for entry in step.entries)
        self.scheduler.complete(step, self.pool.run(step))
        self.take_events()
        return [entry.num_tokens for entry in step.entries]

    def end_sender(self, work_id: WorkId, problem: str | None = None) -> None:
        started = self.senders.pop(work_id)
        if problem is None:
            self.pool.check(started.block_ids, started.work.token_ids, len(started.work.token_ids))
        self.scheduler.sender_ended(work_id, problem)
        self.take_events()


def prompt(num_tokens: int, first: int = 5) -> list[int]:
    return [(first + number) % 50 for number in range(num_tokens)]


def works(*lengths: int, max_tokens: int = 4) -> list[Work]:
    return [make_work(prompt(length, 9 * n), max_tokens, request_id=f"{n:032x}") for n, length in enumerate(lengths)]


def test_a_long_prompt_is_computed_in_chunks_and_short_ones_share_a_step() -> None:
    bench = Bench(chunk=8)
    for work in works(18, 3, 3):
        bench.scheduler.start(work)
    assert [bench.step() for _ in range(4)] == [[3, 3], [8], [8], [2]]


def test_a_short_prompt_that_comes_during_a_long_one_is_computed_between_two_chunks() -> None:
    bench = Bench(chunk=8)
    long, short = works(24, 5)
    bench.scheduler.start(long)
    assert bench.step() == [8]
    bench.scheduler.start(short)
    assert bench.step() == [5]
    assert list(bench.computed) == [short.work_id]
    assert [bench.step() for _ in range(3)] == [[8], [8], []]


def test_a_step_of_few_tokens_is_filled_up_with_a_long_prompt_to_a_quarter() -> None:
    bench = Bench(chunk=16)
    for work in works(30, 1, 2):
        bench.scheduler.start(work)
    assert [bench.step() for _ in range(4)] == [[1, 2, 1], [16], [13], []]


def test_what_counts_is_what_is_not_cached() -> None:
    bench = Bench(num_blocks=32, chunk=8)
    first = make_work(prompt(16), 4, request_id="a" * 32)
    bench.scheduler.start(first)
    assert [bench.step() for _ in range(2)] == [[8], [8]]
    shorter, cached = make_work(prompt(10, 30), 4, request_id="b" * 32), make_work(prompt(20), 4, request_id="c" * 32)
    bench.scheduler.start(shorter)
    bench.scheduler.start(cached)
    assert bench.scheduler.load().num_queued_prompt_tokens == 10 + 4
    assert bench.step() == [4]
    assert list(bench.computed) == [first.work_id, cached.work_id]


def test_a_prompt_that_is_next_and_finds_no_room_is_not_overtaken_for_its_blocks() -> None:
    bench = Bench(num_blocks=8, chunk=64, cache=False)
    held, large = works(8, 28)
    bench.scheduler.start(held)
    assert bench.step() == [8]
    bench.scheduler.start(large)
    for n in range(6):  # short ones that leave nothing behind overtake it, until it counts as no longer than they
        bench.scheduler.start(make_work(prompt(4), 1, request_id=f"{100 + n:032x}"))
        assert bench.step() == [4]
    bench.scheduler.start(make_work(prompt(4), 1, request_id=f"{200:032x}"))
    assert bench.step() == []
    bench.end_sender(held.work_id)
    assert bench.step() == [28, 4]


def test_blocks_are_held_until_the_sender_has_ended() -> None:
    bench = Bench(num_blocks=4)
    first, second = works(12, 12)
    bench.scheduler.start(first)
    bench.scheduler.start(second)
    assert bench.step() == [8]
    assert bench.step() == [4]
    assert bench.step() == []
    bench.end_sender(first.work_id)
    assert bench.ended == {first.work_id: WorkEnded(first.work_id)}
    assert bench.step() == [8]


def test_at_least_the_last_token_is_computed_when_the_prefix_is_cached() -> None:
    bench = Bench()
    first, second = (make_work(prompt(8), 4, request_id=c * 32) for c in "ab")
    bench.scheduler.start(first)
    assert bench.step() == [8]
    bench.end_sender(first.work_id)
    bench.scheduler.start(second)
    assert bench.step() == [4]
    assert bench.computed[second.work_id].num_cached_tokens == 4


def test_a_work_of_one_token_needs_no_sender() -> None:
    bench = Bench()
    [work] = works(6, max_tokens=1)
    bench.scheduler.start(work)
    bench.step()
    assert not bench.senders
    assert not bench.computed[work.work_id].sends_kv
    assert bench.ended == {work.work_id: WorkEnded(work.work_id)}


def test_a_work_that_ends_with_its_first_token_by_chance_stops_its_sender() -> None:
    bench = Bench()
    [work] = works(6)
    stop_token = expected_output(work, 0)[0]
    sampling = work.sampling.__class__(temperature=0.0, max_tokens=4, stop_token_ids=(stop_token,))
    work = make_work(list(work.token_ids), 4, sampling=sampling)
    bench.scheduler.start(work)
    bench.step()
    assert bench.stopped == {work.work_id}
    assert not bench.ended
    bench.end_sender(work.work_id, "stopped")
    assert bench.ended == {work.work_id: WorkEnded(work.work_id)}


def test_a_broken_push_fails_the_work_and_stops_its_pass() -> None:
    bench = Bench(chunk=4)
    [work] = works(12)
    bench.scheduler.start(work)
    bench.step()
    bench.end_sender(work.work_id, "gone")
    assert bench.ended == {work.work_id: WorkFailed(work.work_id, FailureKind.TRANSFER, "gone")}
    assert bench.step() == []
    assert bench.blocks.num_used_blocks == 0


def test_too_long_prompts_and_too_long_queues_are_refused() -> None:
    bench = Bench(num_blocks=2, waiting=1)
    for work in works(9, 4, 4):
        bench.scheduler.start(work)
    bench.take_events()
    assert [type(event) for event in bench.ended.values()] == [WorkFailed, WorkFailed]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, phases=[Phase.generate])
def test_all_works_end_whatever_happens(seed: int) -> None:
    random = Random(seed)
    bench = Bench(random.randint(8, 24), random.randint(4, 5), random.randint(1, 20), cache=random.random() < 0.7)
    coming = [
        make_work(prompt(random.randint(1, 30), random.choice([5, 6])), random.randint(1, 3), request_id=f"{n:032x}")
        for n in range(8)
    ]
    all_works = {work.work_id: work for work in coming}
    given_up: set[WorkId] = set()
    while coming or bench.scheduler.num_works:
        work_id = random.choice(list(all_works))
        match random.choice(["new", "step", "step", "end", "break", "cancel"]):
            case "new" if coming:
                bench.scheduler.start(coming.pop())
            case "end" if work_id in bench.senders and (work_id in bench.computed or work_id in bench.stopped):
                bench.end_sender(work_id, "stopped" if work_id in bench.stopped else None)
            case "break" if work_id in bench.senders and random.random() < 0.1:
                given_up.add(work_id)
                bench.end_sender(work_id, "gone")
            case "cancel" if random.random() < 0.1:
                given_up.add(work_id)
                bench.scheduler.cancel(work_id)
            case _:
                bench.step()
        bench.take_events()
    assert bench.blocks.num_used_blocks == 0
    assert set(bench.ended) == set(all_works)
    for work_id in all_works.keys() - given_up:
        [token] = bench.computed[work_id].tokens
        assert token.token.token_id == expected_output(all_works[work_id], 0)[0]
