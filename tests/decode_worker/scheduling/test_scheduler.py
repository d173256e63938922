"""Decode scheduler: single rules, each by name. The simulation covers how they meet."""

from dataclasses import replace

import pytest

from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import BlocksReserved, SequencesStarted
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from kvrelay.core.job import FailureKind, Job
from kvrelay.core.prompt_pace import ChunkRange, PromptPace
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.commands import JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step import Step
from tests.support.jobs import make_job
from tests.support.simulated_pool import SimulatedPool, make_token


class Bench:
    """A scheduler over a simulated pool."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        chunk: int = 8,
        running: int = 8,
        waiting: int = 4,
        shared_chunk: int | None = None,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.grants = WriteGrants()
        self.scheduler = DecodeScheduler(self.blocks, DecodeLimits(chunk, running, waiting, shared_chunk), self.grants)
        self.pool = SimulatedPool(num_blocks, block_size)

    def step(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is not None:
            self.scheduler.complete(step, self.pool.run(step))
        return step

    def push(self, job: Job) -> None:
        """A push that succeeds at once."""
        table_blocks = self.reservation_of(job).block_ids
        self.pool.write(table_blocks, job.token_ids, 0, len(job.token_ids))
        tokens = [make_token(job, number, job.token_ids) for number in job.sequences]
        self.scheduler.push_ended(job.job_id, tokens)

    def reservation_of(self, job: Job) -> BlocksReserved:
        events = self.scheduler.drain_events()
        return next(event for event in events if isinstance(event, BlocksReserved) and event.job == job)


def prompt(num_tokens: int, first: int = 5) -> list[int]:
    return [(first + number) % 50 for number in range(num_tokens)]


def test_a_reservation_waits_in_order_until_there_is_room() -> None:
    bench = Bench(num_blocks=4)
    jobs = [make_job(prompt(12), 2, request_id=f"{n:032x}") for n in range(3)]
    for job in jobs:
        bench.scheduler.reserve(PreparedJob(job))
    assert [type(event) for event in bench.scheduler.drain_events()] == [BlocksReserved]
    bench.scheduler.cancel(jobs[0].job_id)
    bench.scheduler.drain_events()
    assert bench.scheduler.schedule() is None
    assert bench.reservation_of(jobs[1]).num_cached_tokens == 0


def test_what_can_never_fit_is_refused_at_once() -> None:
    bench = Bench(num_blocks=4)
    bench.scheduler.reserve(PreparedJob(make_job(prompt(16), 2)))
    [failed] = bench.scheduler.drain_events()
    assert isinstance(failed, JobFailed)
    assert failed.kind is FailureKind.OUT_OF_CAPACITY
    bench.scheduler.reserve(PreparedJob(make_job(prompt(15), 2)))
    assert isinstance(bench.scheduler.drain_events()[0], BlocksReserved)


def test_a_full_queue_refuses() -> None:
    bench = Bench(num_blocks=4, waiting=1)
    for number in range(3):
        bench.scheduler.reserve(PreparedJob(make_job(prompt(12), 2, request_id=f"{number:032x}")))
    kinds = [type(event) for event in bench.scheduler.drain_events()]
    assert kinds == [BlocksReserved, JobFailed]


def test_a_full_queue_of_one_session_has_room_for_another() -> None:
    bench = Bench(num_blocks=4, waiting=4)
    floods = [make_job(prompt(12), 2, request_id=f"{n:032x}", holder=1) for n in range(8)]
    others = [make_job(prompt(12), 2, request_id=f"{n:032x}", holder=2) for n in range(10, 18)]
    for job in floods:
        bench.scheduler.reserve(PreparedJob(job))
    failed = [event.job_id for event in bench.scheduler.drain_events() if isinstance(event, JobFailed)]
    assert failed == [job.job_id for job in floods[5:]], "one has blocks, and four wait"
    for job in others:
        bench.scheduler.reserve(PreparedJob(job))
    failed = [event.job_id for event in bench.scheduler.drain_events() if isinstance(event, JobFailed)]
    assert failed == [floods[4].job_id, floods[3].job_id, *(job.job_id for job in others[2:])]
    assert bench.scheduler.load().num_waiting == 5


def test_places_in_the_batch_are_reserved_like_blocks() -> None:
    bench = Bench(running=3)
    first, second = (make_job(prompt(2), 5, request_id=c * 32, num_sequences=2) for c in "ab")
    bench.scheduler.reserve(PreparedJob(first))
    bench.scheduler.reserve(PreparedJob(second))
    assert [type(event) for event in bench.scheduler.drain_events()] == [BlocksReserved]
    bench.scheduler.reserve(PreparedJob(make_job(prompt(2), 5, request_id="c" * 32, num_sequences=4)))
    assert isinstance(bench.scheduler.drain_events()[0], JobFailed)


def test_a_pushed_job_continues_at_the_next_index_one_token_a_step() -> None:
    bench = Bench()
    job = make_job(prompt(6), 3)
    bench.scheduler.reserve(PreparedJob(job))
    bench.push(job)
    assert bench.scheduler.drain_events() == [SequencesStarted(job.job_id)]
    step = bench.step()
    assert step is not None
    # counted after the step: 6 before it
    assert [(entry.token_begin, entry.num_tokens) for entry in step.entries] == [(7, 1)]
    assert bench.step() is not None
    assert bench.scheduler.drain_events() == [JobEnded(job.job_id)]
    assert bench.step() is None
    assert bench.blocks.num_used_blocks == 0


def test_a_sequence_that_ended_with_its_first_token_is_not_run() -> None:
    bench = Bench()
    job = make_job(prompt(6), 1)
    bench.scheduler.reserve(PreparedJob(job))
    bench.push(job)
    assert bench.scheduler.drain_events() == [SequencesStarted(job.job_id), JobEnded(job.job_id)]
    assert bench.step() is None
    assert bench.blocks.num_used_blocks == 0


def test_prompts_are_computed_in_chunks_while_others_decode() -> None:
    bench = Bench(chunk=8)
    running, local = make_job(prompt(4), 9, request_id="a" * 32), make_job(prompt(20, 30), 2, request_id="b" * 32)
    bench.scheduler.reserve(PreparedJob(running))
    bench.push(running)
    bench.scheduler.reserve(PreparedJob(local))
    bench.scheduler.run_prompt(local.job_id)
    sizes: list[list[tuple[str, int, int]]] = []
    while (step := bench.step()) is not None and len(sizes) < 3:
        sizes.append([(entry.job_id.request_id[0], entry.num_tokens, len(entry.continued)) for entry in step.entries])
    assert sizes == [[("a", 1, 1), ("b", 8, 0)], [("a", 1, 1), ("b", 8, 0)], [("a", 1, 1), ("b", 4, 1)]]


def test_prompts_take_small_chunks_while_others_decode_and_large_ones_when_alone() -> None:
    bench = Bench(num_blocks=32, chunk=8, shared_chunk=3)
    running, local, other = (
        make_job(prompt(n, 3 * n), 4, request_id=c * 32) for n, c in ((4, "a"), (20, "b"), (20, "c"))
    )
    bench.scheduler.reserve(PreparedJob(running))
    bench.push(running)
    for job in (local, other):
        bench.scheduler.reserve(PreparedJob(job))
        bench.scheduler.run_prompt(job.job_id)
    sizes: list[dict[str, int]] = []
    while (step := bench.step()) is not None and len(sizes) < 6:
        sizes.append({entry.job_id.request_id[0]: entry.num_tokens for entry in step.entries})
    # Three steps of a, then b alone until it decodes; c must be content with what b leaves.
    assert sizes == [{"a": 1, "b": 3}, {"a": 1, "b": 3}, {"a": 1, "b": 3}, {"b": 8}, {"b": 3, "c": 5}, {"b": 1, "c": 3}]


def test_prompts_take_small_chunks_while_the_kv_of_another_is_on_its_way() -> None:
    bench = Bench(num_blocks=32, chunk=8, shared_chunk=3)
    pushed, local = make_job(prompt(4), 1, request_id="a" * 32), make_job(prompt(20, 9), 1, request_id="b" * 32)
    bench.scheduler.reserve(PreparedJob(pushed))
    bench.scheduler.reserve(PreparedJob(local))
    bench.scheduler.run_prompt(local.job_id)
    steps = [bench.step(), bench.step()]
    bench.scheduler.cancel(pushed.job_id)
    steps.append(bench.step())
    assert [step.entries[0].num_tokens for step in steps if step] == [3, 3, 8]


def test_a_conversation_s_next_turn_finds_its_prompt_and_its_answer_in_the_cache() -> None:
    bench = Bench(block_size=4)
    job = make_job(prompt(6), 7)
    bench.scheduler.reserve(PreparedJob(job))
    bench.push(job)
    output = [make_token(job, 0, job.token_ids).token.token_id]
    while (step := bench.scheduler.schedule()) is not None:
        tokens = bench.pool.run(step)
        output += [token.token.token_id for token in tokens]
        bench.scheduler.complete(step, tokens)
    assert len(output) == 7
    bench.scheduler.drain_events()
    following = make_job([*job.token_ids, *output, 9, 9], 2, request_id="b" * 32)
    bench.scheduler.reserve(PreparedJob(following))
    # 6 + 7 tokens; the last one has no KV
    assert bench.reservation_of(following).num_cached_tokens == 12


def test_blocks_under_a_writer_are_kept_until_it_has_ended() -> None:
    bench = Bench(num_blocks=4)
    job, other = make_job(prompt(12), 2), make_job(prompt(12, 30), 2, request_id="b" * 32)
    bench.scheduler.reserve(PreparedJob(job))
    reserved = bench.reservation_of(job)
    grant = bench.grants.start_write(job.job_id, bench.grants.grant(job, reserved.block_ids, 0), lambda: None)
    bench.scheduler.fail(job.job_id, FailureKind.DEADLINE, "late")
    bench.scheduler.reserve(PreparedJob(other))
    assert bench.scheduler.schedule() is None
    assert bench.scheduler.drain_events() == []
    bench.grants.finish_write(grant)
    bench.scheduler.push_ended(job.job_id, None)
    assert bench.scheduler.drain_events() == [JobFailed(job.job_id, FailureKind.DEADLINE, "late")]
    assert bench.scheduler.schedule() is None
    assert bench.reservation_of(other).block_ids


def test_a_prompt_asked_for_during_a_push_is_computed_when_the_writer_has_ended() -> None:
    bench = Bench()
    job = make_job(prompt(6), 2)
    bench.scheduler.reserve(PreparedJob(job))
    reserved = bench.reservation_of(job)
    grant = bench.grants.start_write(job.job_id, bench.grants.grant(job, reserved.block_ids, 0), lambda: None)
    bench.scheduler.run_prompt(job.job_id)
    assert bench.step() is None
    bench.grants.finish_write(grant)
    bench.scheduler.push_ended(job.job_id, None, "stopped")
    assert bench.step() is not None


def test_a_sequence_that_outgrows_the_pool_fails_its_job_only() -> None:
    bench = Bench(num_blocks=4)
    job = make_job(prompt(12), 40)
    bench.scheduler.reserve(PreparedJob(job))
    bench.push(job)
    for _ in range(10):
        bench.step()
    [_, failed] = bench.scheduler.drain_events()
    assert isinstance(failed, JobFailed)
    assert failed.kind is FailureKind.OUT_OF_CAPACITY
    assert bench.blocks.num_used_blocks == 0


def test_a_stop_string_in_the_first_token_may_be_reported_before_the_push_is_done() -> None:
    bench = Bench()
    job = make_job(prompt(6), 5, num_sequences=2)
    bench.scheduler.reserve(PreparedJob(job))
    bench.scheduler.finish_sequence(job.job_id, 0)
    bench.push(job)
    step = bench.step()
    assert step is not None
    assert [entry.continued for entry in step.entries] == [(1,)]


def test_a_failed_step_ends_its_jobs_and_frees_them() -> None:
    bench = Bench()
    job = make_job(prompt(6), 5)
    bench.scheduler.reserve(PreparedJob(job))
    bench.push(job)
    step = bench.scheduler.schedule()
    assert step is not None
    for job_id in step.job_ids:
        bench.scheduler.fail(job_id, FailureKind.INTERNAL, "broken")
    assert bench.scheduler.drain_events()[-1] == JobFailed(job.job_id, FailureKind.INTERNAL, "broken")
    assert bench.blocks.num_used_blocks == 0


def isolated(job: Job) -> Job:
    return replace(job, isolated=True)


def ids_in(step: Step | None) -> set[str]:
    return set() if step is None else {entry.job_id.request_id[0] for entry in step.entries}


def test_a_job_that_runs_alone_has_the_engine_from_its_reservation_to_its_second_token() -> None:
    bench = Bench(chunk=8, shared_chunk=2)
    other, alone = (
        make_job(prompt(4), 20, request_id="a" * 32),
        isolated(make_job(prompt(12, 30), 9, request_id="b" * 32)),
    )
    bench.scheduler.reserve(PreparedJob(other))
    bench.push(other)
    assert ids_in(bench.step()) == {"a"}
    bench.scheduler.reserve(PreparedJob(alone))
    assert bench.step() is None, "nothing between its reservation and its prompt"
    bench.scheduler.run_prompt(alone.job_id)
    assert [ids_in(bench.step()) for _ in range(4)] == [{"b"}, {"b"}, {"b"}, {"a", "b"}], "two chunks and a decode step"


def test_jobs_that_run_alone_do_so_one_after_the_other() -> None:
    bench = Bench()
    jobs = [isolated(make_job(prompt(4, n), 9, request_id=c * 32)) for n, c in enumerate("ab")]
    for job in jobs:
        bench.scheduler.reserve(PreparedJob(job))
    assert bench.reservation_of(jobs[0])
    bench.scheduler.run_prompt(jobs[0].job_id)
    assert [ids_in(bench.step()) for _ in range(2)] == [{"a"}, {"a"}]
    assert bench.step() is None
    assert bench.reservation_of(jobs[1])


@pytest.mark.parametrize("when", ["reserved", "running"])
def test_others_go_on_when_a_job_that_ran_alone_is_given_up(when: str) -> None:
    bench = Bench()
    other, alone = make_job(prompt(4), 20, request_id="a" * 32), isolated(make_job(prompt(4), 9, request_id="b" * 32))
    bench.scheduler.reserve(PreparedJob(other))
    bench.push(other)
    bench.scheduler.reserve(PreparedJob(alone))
    if when == "running":
        bench.scheduler.run_prompt(alone.job_id)
        assert ids_in(bench.step()) == {"b"}
    bench.scheduler.cancel(alone.job_id)
    assert ids_in(bench.step()) == {"a"}


def test_a_job_that_runs_alone_never_waits_for_blocks_of_those_that_wait_for_it() -> None:
    bench = Bench(num_blocks=4, block_size=4)
    other, alone = (
        make_job(prompt(8), 7, request_id="a" * 32),
        isolated(make_job(prompt(8, 20), 9, request_id="b" * 32)),
    )
    bench.scheduler.reserve(PreparedJob(other))
    bench.push(other)
    bench.scheduler.reserve(PreparedJob(alone))
    bench.scheduler.run_prompt(alone.job_id)
    while bench.step() is not None:
        pass
    failed = [event for event in bench.scheduler.drain_events() if isinstance(event, JobFailed)]
    assert [(event.job_id, event.kind) for event in failed] == [(alone.job_id, FailureKind.OUT_OF_CAPACITY)]
    assert bench.blocks.num_used_blocks == 0


def test_chunks_follow_the_measured_pace_and_the_load_says_so() -> None:
    pace = PromptPace(ChunkRange(4, 4, 64, step_s=0.1), ChunkRange(2, 2, 64, step_s=0.025))
    scheduler = DecodeScheduler(BlockManager(64, 4), DecodeLimits(64, 8, 8), WriteGrants(), pace=pace)
    pool = SimulatedPool(64, 4)

    def next_chunk(num_decoding: int) -> int:
        step = scheduler.schedule()
        assert step is not None
        scheduler.complete(step, pool.run(step))
        num_tokens = sum(entry.num_tokens for entry in step.entries if entry.is_of_prompt)
        pace.record_step(num_tokens, num_decoding, 0.0125 if num_decoding else num_tokens / 400)
        return num_tokens

    alone = make_job(prompt(44), 15)
    scheduler.reserve(PreparedJob(alone))
    scheduler.run_prompt(alone.job_id)
    assert [next_chunk(0) for _ in range(4)] == [4, 4, 4, 32]
    assert scheduler.load().prefill_tokens_per_s == pytest.approx(400)
    beside = make_job(prompt(20, first=9), 2, request_id="b" * 32)
    scheduler.reserve(PreparedJob(beside))
    scheduler.run_prompt(beside.job_id)
    for _ in range(3):
        pace.record_step(0, 1, 0.01)
    assert [next_chunk(1) for _ in range(4)] == [2, 2, 2, 4]
    load = scheduler.load()
    assert (load.prefill_chunk_tokens, load.shared_prefill_chunk_tokens) == (32, 4)
    assert load.shared_prefill_tokens_per_s == pytest.approx(160)
