"""Prefill scheduler: single rules by name, and a simulation in which everything that can happen
does.
"""

from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvrelay.core.job import FailureKind, Job, JobId
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.commands import JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob
from prefill_worker.scheduling.events import Event, PromptComputed, PromptStarted, SendingStopped
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from tests.support.jobs import make_job
from tests.support.simulated_pool import MODEL, SimulatedPool, expected_output


class Bench:
    """A scheduler over a simulated pool, with senders that check what they would send."""

    def __init__(
        self, num_blocks: int = 16, block_size: int = 4, chunk: int = 8, waiting: int = 100, cache: bool = True
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, cache)
        self.scheduler = PrefillScheduler(self.blocks, MODEL, PrefillLimits(chunk, waiting))
        self.pool = SimulatedPool(num_blocks, block_size)
        self.senders: dict[JobId, PromptStarted] = {}
        self.stopped: set[JobId] = set()
        self.computed: dict[JobId, PromptComputed] = {}
        self.ended: dict[JobId, Event] = {}

    def drain_events(self) -> list[Event]:
        events = self.scheduler.drain_events()
        for event in events:
            match event:
                case PromptStarted(job) if event.sends_kv:
                    self.senders[job.job_id] = event
                case PromptComputed(job_id):
                    self.computed[job_id] = event
                case SendingStopped(job_id):
                    self.stopped.add(job_id)
                case JobEnded(job_id) | JobFailed(job_id):
                    assert job_id not in self.senders, "ended under a sender"
                    assert job_id not in self.ended, "two ends"
                    self.ended[job_id] = event
        self.blocks.check_integrity()
        return events

    def step(self) -> list[int]:
        """The sizes of the step's entries; empty when there is nothing to compute."""
        step = self.scheduler.schedule()
        self.drain_events()
        if step is None:
            return []
        assert all(entry.num_tokens > 0 for entry in step.entries)
        self.scheduler.complete(step, self.pool.run(step))
        self.drain_events()
        return [entry.num_tokens for entry in step.entries]

    def end_sender(self, job_id: JobId, problem: str | None = None) -> None:
        started = self.senders.pop(job_id)
        if problem is None:
            self.pool.check(started.block_ids, started.job.token_ids, len(started.job.token_ids))
        self.scheduler.sender_ended(job_id, problem)
        self.drain_events()


def prompt(num_tokens: int, first: int = 5) -> list[int]:
    return [(first + number) % 50 for number in range(num_tokens)]


def jobs(*lengths: int, max_tokens: int = 4) -> list[Job]:
    return [make_job(prompt(length, 9 * n), max_tokens, request_id=f"{n:032x}") for n, length in enumerate(lengths)]


def test_a_long_prompt_is_computed_in_chunks_and_short_ones_share_a_step() -> None:
    bench = Bench(chunk=8)
    for job in jobs(18, 3, 3):
        bench.scheduler.start(PreparedJob(job))
    assert [bench.step() for _ in range(4)] == [[3, 3], [8], [8], [2]]


def test_a_short_prompt_that_comes_during_a_long_one_is_computed_between_two_chunks() -> None:
    bench = Bench(chunk=8)
    long, short = jobs(24, 5)
    bench.scheduler.start(PreparedJob(long))
    assert bench.step() == [8]
    bench.scheduler.start(PreparedJob(short))
    assert bench.step() == [5]
    assert list(bench.computed) == [short.job_id]
    assert [bench.step() for _ in range(3)] == [[8], [8], []]


def test_a_step_of_few_tokens_is_filled_up_with_a_long_prompt_to_a_quarter() -> None:
    bench = Bench(chunk=16)
    for job in jobs(30, 1, 2):
        bench.scheduler.start(PreparedJob(job))
    assert [bench.step() for _ in range(4)] == [[1, 2, 1], [16], [13], []]


def test_what_counts_is_what_is_not_cached() -> None:
    bench = Bench(num_blocks=32, chunk=8)
    first = make_job(prompt(16), 4, request_id="a" * 32)
    bench.scheduler.start(PreparedJob(first))
    assert [bench.step() for _ in range(2)] == [[8], [8]]
    shorter, cached = make_job(prompt(10, 30), 4, request_id="b" * 32), make_job(prompt(20), 4, request_id="c" * 32)
    bench.scheduler.start(PreparedJob(shorter))
    bench.scheduler.start(PreparedJob(cached))
    assert bench.scheduler.load().num_queued_prompt_tokens == 10 + 4
    assert bench.step() == [4]
    assert list(bench.computed) == [first.job_id, cached.job_id]


def test_a_prompt_that_is_next_and_finds_no_room_is_not_overtaken_for_its_blocks() -> None:
    bench = Bench(num_blocks=8, chunk=64, cache=False)
    held, large = jobs(8, 28)
    bench.scheduler.start(PreparedJob(held))
    assert bench.step() == [8]
    bench.scheduler.start(PreparedJob(large))
    # short ones that leave nothing behind overtake it, until it counts as no longer than they
    for n in range(6):
        bench.scheduler.start(PreparedJob(make_job(prompt(4), 1, request_id=f"{100 + n:032x}")))
        assert bench.step() == [4]
    bench.scheduler.start(PreparedJob(make_job(prompt(4), 1, request_id=f"{200:032x}")))
    assert bench.step() == []
    bench.end_sender(held.job_id)
    assert bench.step() == [28, 4]


def share_job(share: str, number: int, num_tokens: int, max_tokens: int = 4) -> Job:
    return make_job(prompt(num_tokens, 9 * number), max_tokens, request_id=f"{number:032x}", cache_salt=share)


def test_a_short_prompt_of_another_share_does_not_wait_behind_a_queue_of_long_ones() -> None:
    bench = Bench(num_blocks=64, chunk=8)
    for number in range(5):
        bench.scheduler.start(PreparedJob(share_job("greedy", number, 24)))
    assert bench.step() == [8]
    for number in range(5, 12):
        small = share_job(f"small {number}", number, 6, max_tokens=1)
        bench.scheduler.start(PreparedJob(small))
        bench.step()
        assert small.job_id in bench.computed


def test_a_share_that_holds_blocks_waits_for_more_while_others_pass() -> None:
    bench = Bench(num_blocks=8, chunk=64, cache=False)
    held, large = share_job("greedy", 1, 16), share_job("greedy", 2, 28)
    bench.scheduler.start(PreparedJob(held))
    assert bench.step() == [16]
    bench.scheduler.start(PreparedJob(large))
    assert bench.step() == []
    passing = share_job("small", 4, 4, max_tokens=1)
    bench.scheduler.start(PreparedJob(passing))
    assert bench.step() == [4]


def test_prompts_of_one_share_leave_a_quarter_of_the_pool_to_others() -> None:
    bench = Bench(num_blocks=8, chunk=64, cache=False)
    bench.scheduler.start(PreparedJob(share_job("other", 1, 4, max_tokens=1)))
    assert bench.step() == [4]
    for number in (2, 3):
        bench.scheduler.start(PreparedJob(share_job("greedy", number, 16)))
    assert bench.step() == [16], "the second one would take all"
    bench.scheduler.start(PreparedJob(share_job("small", 4, 8)))
    assert bench.step() == [8]


def test_a_share_that_holds_no_blocks_is_not_overtaken_for_ever() -> None:
    bench = Bench(num_blocks=8, chunk=64, cache=False)
    held = share_job("holder", 1, 16)
    bench.scheduler.start(PreparedJob(held))
    assert bench.step() == [16]
    bench.scheduler.start(PreparedJob(share_job("large", 2, 28)))
    for number, expected in ((3, [4]), (4, [])):
        bench.scheduler.start(PreparedJob(share_job("small", number, 4, max_tokens=1)))
        assert bench.step() == expected
    bench.end_sender(held.job_id)
    assert bench.step() == [28, 4]


def test_blocks_are_held_until_the_sender_has_ended() -> None:
    bench = Bench(num_blocks=4)
    first, second = jobs(12, 12)
    bench.scheduler.start(PreparedJob(first))
    bench.scheduler.start(PreparedJob(second))
    assert bench.step() == [8]
    assert bench.step() == [4]
    assert bench.step() == []
    bench.end_sender(first.job_id)
    assert bench.ended == {first.job_id: JobEnded(first.job_id)}
    assert bench.step() == [8]


def test_at_least_the_last_token_is_computed_when_the_prefix_is_cached() -> None:
    bench = Bench()
    first, second = (make_job(prompt(8), 4, request_id=c * 32) for c in "ab")
    bench.scheduler.start(PreparedJob(first))
    assert bench.step() == [8]
    bench.end_sender(first.job_id)
    bench.scheduler.start(PreparedJob(second))
    assert bench.step() == [4]
    assert bench.computed[second.job_id].num_cached_tokens == 4


def test_a_job_of_one_token_needs_no_sender() -> None:
    bench = Bench()
    [job] = jobs(6, max_tokens=1)
    bench.scheduler.start(PreparedJob(job))
    bench.step()
    assert not bench.senders
    assert not bench.computed[job.job_id].sends_kv
    assert bench.ended == {job.job_id: JobEnded(job.job_id)}


def test_a_job_that_ends_with_its_first_token_by_chance_stops_its_sender() -> None:
    bench = Bench()
    [job] = jobs(6)
    stop_token = expected_output(job, 0)[0]
    sampling = job.sampling.__class__(temperature=0.0, max_tokens=4, stop_token_ids=(stop_token,))
    job = make_job(list(job.token_ids), 4, sampling=sampling)
    bench.scheduler.start(PreparedJob(job))
    bench.step()
    assert bench.stopped == {job.job_id}
    assert not bench.ended
    bench.end_sender(job.job_id, "stopped")
    assert bench.ended == {job.job_id: JobEnded(job.job_id)}


def test_a_broken_push_fails_the_job_and_stops_its_pass() -> None:
    bench = Bench(chunk=4)
    [job] = jobs(12)
    bench.scheduler.start(PreparedJob(job))
    bench.step()
    bench.end_sender(job.job_id, "gone")
    assert bench.ended == {job.job_id: JobFailed(job.job_id, FailureKind.TRANSFER, "gone")}
    assert bench.step() == []
    assert bench.blocks.num_used_blocks == 0


def test_a_full_queue_of_one_session_has_room_for_another() -> None:
    bench = Bench(waiting=4)
    floods = [make_job([5] * 12, 2, request_id=f"{n:032x}", holder=1) for n in range(8)]
    others = [make_job([5] * 12, 2, request_id=f"{n:032x}", holder=2) for n in range(10, 18)]
    for job in (*floods, *others):
        bench.scheduler.start(PreparedJob(job))
    bench.drain_events()
    left = [job.job_id for job in (*floods, *others) if job.job_id not in bench.ended]
    assert left == [job.job_id for job in (*floods[:2], *others[:2])]


def test_too_long_prompts_and_too_long_queues_are_refused() -> None:
    bench = Bench(num_blocks=2, waiting=1)
    for job in jobs(9, 4, 4):
        bench.scheduler.start(PreparedJob(job))
    bench.drain_events()
    assert [type(event) for event in bench.ended.values()] == [JobFailed, JobFailed]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300, deadline=None, phases=[Phase.generate])
def test_all_jobs_end_whatever_happens(seed: int) -> None:
    random = Random(seed)
    bench = Bench(random.randint(8, 24), random.randint(4, 5), random.randint(1, 20), cache=random.random() < 0.7)
    coming = [
        make_job(
            prompt(random.randint(1, 30), random.choice([5, 6])),
            random.randint(1, 3),
            request_id=f"{n:032x}",
            cache_salt=random.choice(["", "a", "b"]),
        )
        for n in range(8)
    ]
    all_jobs = {job.job_id: job for job in coming}
    given_up: set[JobId] = set()
    while coming or bench.scheduler.job_ids():
        job_id = random.choice(list(all_jobs))
        match random.choice(["new", "step", "step", "end", "break", "cancel"]):
            case "new" if coming:
                bench.scheduler.start(PreparedJob(coming.pop()))
            case "end" if job_id in bench.senders and (job_id in bench.computed or job_id in bench.stopped):
                bench.end_sender(job_id, "stopped" if job_id in bench.stopped else None)
            case "break" if job_id in bench.senders and random.random() < 0.1:
                given_up.add(job_id)
                bench.end_sender(job_id, "gone")
            case "cancel" if random.random() < 0.1:
                given_up.add(job_id)
                bench.scheduler.cancel(job_id)
            case _:
                bench.step()
        bench.drain_events()
    assert bench.blocks.num_used_blocks == 0
    assert set(bench.ended) == set(all_jobs)
    for job_id in all_jobs.keys() - given_up:
        [token] = bench.computed[job_id].tokens
        assert token.token.token_id == expected_output(all_jobs[job_id], 0)[0]
