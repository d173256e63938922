"""Timelines as values: whether tokens are contiguous, what a recovery cost, chunks that stay few,
and the way over the wire.
"""

from datetime import UTC, datetime

import pytest

from kvrelay.core.chunk_times import MAX_CHUNK_TIMES, ChunkLog, ChunkTime
from kvrelay.core.timeline import JobOutcome, JobTimeline, Phases, SpanKind, Timeline, TimelineSpan, TokenRun
from kvrelay.wire.timeline import timeline_from_pb, timeline_to_pb


def run(first_index: int, num_tokens: int, first_ms: float = 0.0, last_ms: float = 0.0, sequence: int = 0) -> TokenRun:
    return TokenRun(sequence, first_index, num_tokens, first_ms, last_ms, (first_ms,), 1)


def timeline(*jobs: tuple[TokenRun, ...], num_tokens_before: tuple[int, ...] = ()) -> Timeline:
    made = tuple(
        JobTimeline(number + 1, 0, 1, 0.0, 1.0, JobOutcome.COMPLETED, token_runs=runs)
        for number, runs in enumerate(jobs)
    )
    return Timeline("g", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 9.0, True, num_tokens_before, made)


@pytest.mark.parametrize(
    ("jobs", "before", "is_contiguous"),
    [
        (((run(0, 5),), (run(5, 3),)), (), True),
        (((run(0, 5),), (run(6, 3),)), (), False),
        (((run(0, 5),), (run(4, 3),)), (), False),
        (((run(1, 5),),), (), False),
        (((run(7, 5),),), (7,), True),
        (((run(0, 5),),), (7,), False),
        ((), (), False),
    ],
)
def test_tokens_are_contiguous_only_if_each_index_came_once(
    jobs: tuple[tuple[TokenRun, ...], ...], before: tuple[int, ...], is_contiguous: bool
) -> None:
    assert timeline(*jobs, num_tokens_before=before).is_contiguous(0) is is_contiguous


def test_a_pause_lies_between_the_last_token_of_an_attempt_and_the_first_of_the_next() -> None:
    assert timeline((run(0, 5, 1.0, 4.0),), (run(5, 3, 9.0, 11.0),)).pauses(0) == [(4.0, 9.0)]


def test_many_chunks_become_few_without_losing_a_token_or_a_byte() -> None:
    log = ChunkLog()
    for number in range(1000):
        log.add(ChunkTime(number, number + 0.5, number * 16, number * 16 + 16, 0, 4, 100))
    times = log.times
    assert MAX_CHUNK_TIMES // 2 < len(times) <= MAX_CHUNK_TIMES
    assert sum(chunk.num_bytes for chunk in times) == 100_000
    assert sum(chunk.num_chunks for chunk in times) == 1000
    assert [chunk.token_begin for chunk in times[1:]] == [chunk.token_end for chunk in times[:-1]]
    assert (times[0].begin_ms, times[-1].end_ms) == (0, 999.5)
    assert {chunk.num_chunks for chunk in times[:-1]} == {16}, "as coarse at the end as at the beginning"


def test_a_timeline_is_the_same_after_its_way_over_the_wire() -> None:
    job = JobTimeline(
        attempt=2,
        first_sequence=1,
        num_sequences=1,
        begin_ms=0.5,
        end_ms=8.0,
        outcome=JobOutcome.RETRIED,
        end_reason="decode-1 was lost",
        failed_worker_id="decode-1",
        prefill_worker_id="prefill-1",
        decode_worker_id="decode-1",
        prefilled_on_decode_worker=True,
        spans=tuple(TimelineSpan(kind, 0.5, 1.5, "w", unreported=kind is SpanKind.DECODE) for kind in SpanKind),
        prompt_chunks=(ChunkTime(0.5, 1.0, 0, 16),),
        kv_chunks=(ChunkTime(0.5, 1.0, 0, 16, 0, 4, 4096, 2),),
        num_prompt_tokens=16,
        num_cached_tokens=8,
        kv_bytes=4096,
        exposed_transfer_ms=0.25,
        transfer_wire_ms=0.5,
        transfer_transport="grpc",
        token_runs=(TokenRun(1, 3, 9, 2.0, 7.0, (2.0, 4.5, 7.0), 4),),
    )
    start_time = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    whole = Timeline("g", start_time, 9.0, False, (3, 4), (job,), 5, Phases(queue_ms=1.5, num_attempts=2))
    assert timeline_from_pb(timeline_to_pb(whole)) == whole
    assert {outcome: _outcome_after_the_wire(outcome) for outcome in JobOutcome} == {
        outcome: outcome for outcome in JobOutcome
    }


def _outcome_after_the_wire(outcome: JobOutcome) -> JobOutcome:
    whole = Timeline("g", datetime(2026, 1, 1, tzinfo=UTC), 1.0, True, (), (JobTimeline(1, 0, 1, 0.0, 1.0, outcome),))
    return timeline_from_pb(timeline_to_pb(whole)).jobs[0].outcome


def test_times_that_travelled_show_no_digits_that_were_never_measured() -> None:
    job = JobTimeline(
        attempt=1,
        first_sequence=0,
        num_sequences=1,
        outcome=JobOutcome.COMPLETED,
        begin_ms=0.1,
        end_ms=1240.1,
        spans=(TimelineSpan(SpanKind.DECODE, 136.257, 1240.1, "d"),),
        token_runs=(TokenRun(0, 0, 2, 136.257, 1240.1, (136.257, 1240.1), 1),),
        prompt_chunks=(ChunkTime(0.7, 136.257, 0, 4),),
        kv_chunks=(ChunkTime(0.9, 136.3, 0, 4),),
        transfer_wire_ms=99.9,
        exposed_transfer_ms=0.3,
    )
    sent = Timeline("g", datetime(2026, 1, 2, tzinfo=UTC), 1240.1, True, (), (job,))
    assert timeline_from_pb(timeline_to_pb(sent)) == sent
