"""A request's timeline: phases on the gateway's clock, why attempts ended, and its bounds."""

import pytest

from gateway.lifecycle import events
from gateway.telemetry.request_timeline import MAX_CHUNKS, MAX_JOBS, MAX_MARKS, RequestTimeline
from gateway.telemetry.timeline_spans import timeline_of
from gateway.telemetry.timelines import Timelines
from kvrelay.core.chunk_times import MAX_CHUNK_TIMES, ChunkTime
from kvrelay.core.job import FailureKind, Job, JobId, SequenceToken, Token
from kvrelay.core.request_state import RequestState
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.core.timeline import JobOutcome, SpanKind, Timeline
from kvrelay.errors import OverloadedError

BEGIN = 100.0
"""Submit time, in monotonic seconds."""
ROUTE_TIME_MS, RESERVE_TIME_MS = 10, 20


class Bench:
    """A request's timeline; times are milliseconds since it came."""

    def __init__(self, **arguments: object) -> None:
        self.timeline = RequestTimeline(BEGIN, 0.0, **arguments)  # type: ignore[arg-type]

    def event(self, at_ms: float, event: events.Event) -> None:
        self.timeline.on_event(event, BEGIN + at_ms / 1000)

    def action(self, at_ms: float, action: events.Action) -> None:
        self.timeline.on_action(action, BEGIN + at_ms / 1000)

    def begin(self, job: Job, at_ms: float = 0.0, prefill: str | None = "p1", decode: str = "d1") -> None:
        """Sends the prompt 30 ms after the request came."""
        self.action(at_ms, route(job))
        self.event(at_ms + ROUTE_TIME_MS, events.Routed(job.job_id, decode, prefill))
        self.action(at_ms + ROUTE_TIME_MS, events.SendReserve(decode, job))
        self.event(at_ms + 30, events.Reserved(decode, job.job_id, b"", "", 16))
        self.action(
            at_ms + 30,
            events.SendStartPrefill(prefill, job, b"", "", 16) if prefill else events.SendRunPrompt(decode, job.job_id),
        )

    def tokens(
        self, job: Job, *times_ms: float, first_index: int = 0, is_last: bool = False, sequence: int = 0
    ) -> None:
        for number, at_ms in enumerate(times_ms):
            token = SequenceToken(job.job_id, sequence, first_index + number, Token(7))
            self.timeline.on_token(token, is_last and number == len(times_ms) - 1, BEGIN + at_ms / 1000)

    def retry(self, at_ms: float, cause: events.Event, attempt: int = 2) -> None:
        self.event(at_ms, cause)
        self.action(at_ms, events.SetState(RequestState.QUEUED, attempt, None, None))

    def end(
        self, at_ms: float, state: RequestState = RequestState.SUCCEEDED, error: OverloadedError | None = None
    ) -> None:
        self.timeline.on_end(state, error, BEGIN + at_ms / 1000)

    def told(self, now_ms: float = 1000.0) -> Timeline:
        return timeline_of(self.timeline, "g", BEGIN + now_ms / 1000)


def make_job(attempt: int = 1, num_emitted: int = 0, first_sequence: int = 0, num_sequences: int = 1) -> Job:
    tokens = tuple(range(40 + num_emitted))
    return Job(JobId("r", attempt, first_sequence), tokens, 40, num_sequences, SamplingParams(), "", 0)


def route(job: Job) -> events.Route:
    return events.Route(job, frozenset(), frozenset())


def spans_of(timeline: Timeline, number: int = 0) -> dict[SpanKind, tuple[float, float]]:
    return {span.kind: (round(span.begin_ms, 3), round(span.end_ms, 3)) for span in timeline.jobs[number].spans}


def test_phases_end_when_the_workers_reports_arrive() -> None:
    bench, job = Bench(), make_job()
    bench.begin(job)
    chunks = (ChunkTime(0, 20, 16, 32), ChunkTime(25, 40, 32, 40))
    bench.event(100, events.PrefillDone("p1", job.job_id, (), queue_ms=25, prefill_ms=40, chunks=chunks))
    bench.tokens(job, 100)
    bench.event(120, events.DecodeStarted("d1", job.job_id, 4096))
    kv_chunks = (ChunkTime(0, 30, 16, 40, 0, 4, 4096),)
    bench.event(125, events.TransferDone("p1", job.job_id, 4096, 50.0, 5.0, 30.0, "grpc", kv_chunks))
    bench.tokens(job, 130, 140, first_index=1, is_last=True)
    bench.end(141)
    told = bench.told()
    assert spans_of(told) == {
        SpanKind.ROUTE: (0, 10),
        SpanKind.RESERVE: (10, 30),
        SpanKind.PROMPT_QUEUE: (35, 60),
        SpanKind.PREFILL: (60, 100),
        SpanKind.TRANSFER: (75, 125),
        SpanKind.DECODE: (120, 140),
    }
    (told_job,) = told.jobs
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told_job.prompt_chunks] == [
        pytest.approx((60, 80)),
        pytest.approx((85, 100)),
    ]
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told_job.kv_chunks] == [pytest.approx((75, 105))]
    assert (told_job.kv_bytes, told_job.exposed_transfer_ms, told_job.transfer_wire_ms) == (4096, 5.0, 30.0)
    assert (told_job.outcome, told.ended, told.is_contiguous(0)) == (JobOutcome.COMPLETED, True, True)
    assert not any(span.unreported for span in told_job.spans)


def test_reported_durations_are_cut_to_the_time_between_command_and_report() -> None:
    bench, job = Bench(), make_job()
    bench.begin(job)
    chunks = (ChunkTime(-50, 1e9, 16, 40),)
    bench.event(100, events.PrefillDone("p1", job.job_id, (), queue_ms=1e9, prefill_ms=1e9, chunks=chunks))
    bench.event(110, events.TransferDone("p1", job.job_id, 10, 1e9, 0.0, 0.0, "grpc", chunks))
    told = bench.told()
    assert spans_of(told)[SpanKind.PREFILL] == (30, 100)
    assert spans_of(told)[SpanKind.TRANSFER] == (30, 110)
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told.jobs[0].prompt_chunks] == [pytest.approx((30, 100))]


def test_a_prompt_on_the_decode_worker_has_its_chunks_and_no_transfer() -> None:
    bench, job = Bench(), make_job()
    bench.begin(job, prefill=None)
    bench.event(
        100, events.DecodeStarted("d1", job.job_id, 0, prefill_ms=60, queue_ms=20, chunks=(ChunkTime(0, 40, 16, 40),))
    )
    bench.tokens(job, 100)
    told = bench.told()
    assert spans_of(told)[SpanKind.PROMPT_QUEUE] == (40, 60)
    assert spans_of(told)[SpanKind.PREFILL] == (60, 100)
    assert SpanKind.TRANSFER not in spans_of(told)
    assert told.jobs[0].prefilled_on_decode_worker
    assert len(told.jobs[0].prompt_chunks) == 1


def test_a_lost_worker_ends_an_attempt_and_the_next_goes_on_with_the_next_index() -> None:
    bench, first, second = Bench(), make_job(), make_job(attempt=2, num_emitted=3)
    bench.begin(first)
    bench.event(100, events.PrefillDone("p1", first.job_id, (), 0, 50))
    bench.tokens(first, 100, 110, 120)
    bench.retry(150, events.WorkerLost("d1"))
    bench.begin(second, at_ms=150, decode="d2")
    bench.event(210, events.PrefillDone("p1", second.job_id, (), 0, 20))
    bench.tokens(second, 210, 220, first_index=3, is_last=True)
    bench.end(220)
    told = bench.told()
    assert [job.outcome for job in told.jobs] == [JobOutcome.RETRIED, JobOutcome.COMPLETED]
    assert (told.jobs[0].end_reason, told.jobs[0].failed_worker_id) == ("d1 was lost", "d1")
    assert told.jobs[0].end_ms == pytest.approx(150)
    assert told.is_contiguous(0)
    (pause,) = told.pauses(0)
    assert pause == pytest.approx((120, 210))
    assert (told.num_attempts, told.jobs[1].num_prompt_tokens) == (2, 43)
    unreported = told.jobs[0].span(SpanKind.TRANSFER)
    assert unreported is not None
    assert unreported.unreported, "the transfer's end was never heard of"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (
            events.JobFailed("p1", JobId("r", 1), FailureKind.TRANSFER, "no answer"),
            "p1 could not transfer the KV: no answer",
        ),
        (events.JobFailed("d1", JobId("r", 1), FailureKind.OUT_OF_CAPACITY, "full"), "d1 had no room: full"),
        (events.TimerFired(1), "the KV transfer was not completed in time"),
        (events.DecodeTokens("d1", ()), "d1 left out a token"),
    ],
)
def test_a_retried_attempt_says_why(cause: events.Event, reason: str) -> None:
    bench = Bench()
    bench.begin(make_job())
    bench.retry(90, cause)
    assert bench.told().jobs[0].end_reason == reason


def test_a_failed_request_marks_the_job_that_was_running() -> None:
    bench = Bench()
    bench.begin(make_job())
    bench.end(80, RequestState.FAILED, OverloadedError("read faster"))
    (job,) = bench.told().jobs
    assert (job.outcome, job.end_reason) == (JobOutcome.ENDED, "read faster")
    assert job.end_ms == pytest.approx(80)


def test_the_open_phase_of_a_running_request_lasts_until_now() -> None:
    bench = Bench()
    bench.begin(make_job())
    span = bench.told(now_ms=500).jobs[0].span(SpanKind.PREFILL)
    assert span is not None
    assert span.end_ms == pytest.approx(500)
    assert span.unreported
    assert not bench.told(500).ended


def test_a_transfer_reported_after_the_last_token_still_counts() -> None:
    bench, job = Bench(), make_job()
    bench.begin(job)
    bench.event(100, events.PrefillDone("p1", job.job_id, ()))
    bench.tokens(job, 100, 101, is_last=True)
    bench.event(105, events.TransferDone("p1", job.job_id, 64, 2.0, 1.0, 2.0, "grpc"))
    bench.end(105)
    assert bench.told().jobs[0].kv_bytes == 64


def test_reports_of_an_earlier_attempt_change_nothing() -> None:
    bench, job = Bench(), make_job()
    bench.begin(job)
    bench.retry(90, events.WorkerLost("d1"))
    before = bench.told()
    bench.event(95, events.PrefillDone("p1", job.job_id, (), 1, 2, (ChunkTime(0, 1, 0, 1),)))
    bench.event(95, events.TransferDone("p1", job.job_id, 64))
    assert bench.told() == before


def test_a_long_output_keeps_few_marks_and_all_counts() -> None:
    bench, job, num_tokens = Bench(), make_job(), 5000
    bench.begin(job)
    bench.tokens(job, *range(100, 100 + num_tokens))
    (run,) = bench.told().jobs[0].token_runs
    assert run.num_tokens == num_tokens
    assert MAX_MARKS // 2 < len(run.mark_ms) <= MAX_MARKS
    assert list(run.mark_ms) == pytest.approx(
        [100 + number * run.mark_stride for number in range(len(run.mark_ms))], rel=1e-4
    )


def test_many_attempts_and_chunks_stay_within_bounds() -> None:
    bench, chunks = (
        Bench(),
        tuple(ChunkTime(number, number + 1, number, number + 1) for number in range(MAX_CHUNK_TIMES)),
    )
    for attempt in range(1, 2 * MAX_JOBS + 1):
        job = make_job(attempt)
        bench.begin(job, at_ms=attempt * 10)
        bench.event(attempt * 10 + 40, events.PrefillDone("p1", job.job_id, (), 0, 5, chunks))
        bench.retry(attempt * 10 + 41, events.WorkerLost("d1"), attempt + 1)
    told = bench.told(1e5)
    assert len(told.jobs) == MAX_JOBS
    assert told.num_forgotten_jobs == MAX_JOBS
    assert [told.jobs[0].attempt, told.jobs[-1].attempt] == [1, 2 * MAX_JOBS], "the first one and the latest"
    num_chunks = sum(len(each.prompt_chunks) for each in told.jobs)
    assert 0 < num_chunks <= MAX_CHUNKS
    assert told.jobs[-1].prompt_chunks, "of the latest"


def test_sequences_of_a_later_attempt_are_told_apart() -> None:
    bench = Bench()
    first, second = make_job(2, 1, 0), make_job(2, 2, 1)
    bench.begin(first)
    bench.begin(second, decode="d2")
    bench.tokens(first, 100, first_index=1, is_last=True)
    bench.tokens(second, 101, first_index=2, sequence=1)
    told = bench.told()
    assert [job.outcome for job in told.jobs] == [JobOutcome.COMPLETED, JobOutcome.RUNNING]
    assert [[run.sequence for run in job.token_runs] for job in told.jobs] == [[0], [1]]


def test_a_gateway_keeps_the_last_timelines_and_sums_transfers() -> None:
    timelines, job = Timelines(max_requests=2), make_job()
    for number in range(3):
        bench = Bench()
        bench.timeline = timelines.begin(f"r{number}", BEGIN)
        bench.begin(job)
        bench.event(100, events.PrefillDone("p1", job.job_id, ()))
        bench.tokens(job, 100, 101)
        bench.event(110, events.TransferDone("p1", job.job_id, 1000, wire_ms=2.0))
        timelines.on_ended(f"r{number}")
    assert [timelines.find(f"r{number}") is None for number in range(3)] == [True, False, False]
    ((prefill, decode, total),) = timelines.transfers()
    assert (prefill, decode, total.num_transfers, total.kv_bytes, total.wire_ms) == ("p1", "d1", 3, 3000, 6.0)
    assert timelines.total_output_tokens == 6
