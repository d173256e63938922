"""What a gateway remembers of a request: phases on its own clock, why attempts ended, and never more than its bounds."""

import pytest

from gateway import lifecycle_messages as m
from gateway.request_timeline import MAX_CHUNKS, MAX_MARKS, MAX_WORKS, RequestTimeline
from gateway.timeline_spans import timeline_of
from gateway.timelines import Timelines
from kvrelay.chunk_times import MAX_CHUNK_TIMES, ChunkTime
from kvrelay.errors import OverloadedError
from kvrelay.request_state import RequestState
from kvrelay.sampling_params import SamplingParams
from kvrelay.timeline import SpanKind, Timeline, WorkOutcome
from kvrelay.work import FailureKind, SequenceToken, Token, Work, WorkId

BEGIN = 100.0
"""Monotonic seconds at which the request comes."""
ROUTE_TIME_MS, RESERVE_TIME_MS = 10, 20


class Bench:
    """A request's timeline; times are milliseconds since it came."""

    def __init__(self, **arguments: object) -> None:
        self.timeline = RequestTimeline(BEGIN, 0.0, **arguments)  # type: ignore[arg-type]

    def event(self, at_ms: float, event: m.Event) -> None:
        self.timeline.note_event(event, BEGIN + at_ms / 1000)

    def action(self, at_ms: float, action: m.Action) -> None:
        self.timeline.note_action(action, BEGIN + at_ms / 1000)

    def begin(self, work: Work, at_ms: float = 0.0, prefill: str | None = "p1", decode: str = "d1") -> None:
        """Up to the command that has the prompt computed: that is sent 30 ms later."""
        self.action(at_ms, route(work))
        self.event(at_ms + ROUTE_TIME_MS, m.Routed(work.work_id, decode, prefill))
        self.action(at_ms + ROUTE_TIME_MS, m.SendReserve(decode, work))
        self.event(at_ms + 30, m.Reserved(decode, work.work_id, b"", "", 16))
        self.action(
            at_ms + 30, m.SendStartPrefill(prefill, work, b"", "", 16) if prefill else m.SendRunPrompt(decode, work.work_id)
        )

    def tokens(self, work: Work, *times_ms: float, first_index: int = 0, is_last: bool = False, sequence: int = 0) -> None:
        for number, at_ms in enumerate(times_ms):
            token = SequenceToken(work.work_id, sequence, first_index + number, Token(7))
            self.timeline.note_token(token, is_last and number == len(times_ms) - 1, BEGIN + at_ms / 1000)

    def retry(self, at_ms: float, cause: m.Event, attempt: int = 2) -> None:
        self.event(at_ms, cause)
        self.action(at_ms, m.SetState(RequestState.QUEUED, attempt, None, None))

    def end(self, at_ms: float, state: RequestState = RequestState.SUCCEEDED, error: OverloadedError | None = None) -> None:
        self.timeline.note_end(state, error, BEGIN + at_ms / 1000)

    def told(self, now_ms: float = 1000.0) -> Timeline:
        return timeline_of(self.timeline, "g", BEGIN + now_ms / 1000)


def make_work(attempt: int = 1, num_emitted: int = 0, first_sequence: int = 0, num_sequences: int = 1) -> Work:
    tokens = tuple(range(40 + num_emitted))
    return Work(WorkId("r", attempt, first_sequence), tokens, 40, num_sequences, SamplingParams(), "", 0)


def route(work: Work) -> m.Route:
    return m.Route(work, frozenset(), frozenset())


def spans_of(timeline: Timeline, number: int = 0) -> dict[SpanKind, tuple[float, float]]:
    return {span.kind: (round(span.begin_ms, 3), round(span.end_ms, 3)) for span in timeline.works[number].spans}


def test_phases_are_durations_of_workers_that_end_when_their_reports_come() -> None:
    bench, work = Bench(), make_work()
    bench.begin(work)
    chunks = (ChunkTime(0, 20, 16, 32), ChunkTime(25, 40, 32, 40))
    bench.event(100, m.PrefillDone("p1", work.work_id, (), queue_ms=25, prefill_ms=40, chunks=chunks))
    bench.tokens(work, 100)
    bench.event(120, m.DecodeStarted("d1", work.work_id, 4096))
    kv_chunks = (ChunkTime(0, 30, 16, 40, 0, 4, 4096),)
    bench.event(125, m.TransferDone("p1", work.work_id, 4096, 50.0, 5.0, 30.0, "grpc", kv_chunks))
    bench.tokens(work, 130, 140, first_index=1, is_last=True)
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
    (told_work,) = told.works
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told_work.prompt_chunks] == [
        pytest.approx((60, 80)),
        pytest.approx((85, 100)),
    ]
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told_work.kv_chunks] == [pytest.approx((75, 105))]
    assert (told_work.kv_bytes, told_work.exposed_transfer_ms, told_work.transfer_wire_ms) == (4096, 5.0, 30.0)
    assert (told_work.outcome, told.ended, told.is_contiguous(0)) == (WorkOutcome.COMPLETED, True, True)
    assert not any(span.unreported for span in told_work.spans)


def test_what_a_worker_claims_is_kept_between_the_command_and_its_report() -> None:
    bench, work = Bench(), make_work()
    bench.begin(work)
    chunks = (ChunkTime(-50, 1e9, 16, 40),)
    bench.event(100, m.PrefillDone("p1", work.work_id, (), queue_ms=1e9, prefill_ms=1e9, chunks=chunks))
    bench.event(110, m.TransferDone("p1", work.work_id, 10, 1e9, 0.0, 0.0, "grpc", chunks))
    told = bench.told()
    assert spans_of(told)[SpanKind.PREFILL] == (30, 100)
    assert spans_of(told)[SpanKind.TRANSFER] == (30, 110)
    assert [(chunk.begin_ms, chunk.end_ms) for chunk in told.works[0].prompt_chunks] == [pytest.approx((30, 100))]


def test_a_prompt_on_the_decode_worker_has_its_chunks_and_no_transfer() -> None:
    bench, work = Bench(), make_work()
    bench.begin(work, prefill=None)
    bench.event(100, m.DecodeStarted("d1", work.work_id, 0, prefill_ms=60, queue_ms=20, chunks=(ChunkTime(0, 40, 16, 40),)))
    bench.tokens(work, 100)
    told = bench.told()
    assert spans_of(told)[SpanKind.PROMPT_QUEUE] == (40, 60)
    assert spans_of(told)[SpanKind.PREFILL] == (60, 100)
    assert SpanKind.TRANSFER not in spans_of(told)
    assert told.works[0].prefilled_on_decode_worker
    assert len(told.works[0].prompt_chunks) == 1


def test_a_lost_worker_ends_an_attempt_and_the_next_goes_on_with_the_next_index() -> None:
    bench, first, second = Bench(), make_work(), make_work(attempt=2, num_emitted=3)
    bench.begin(first)
    bench.event(100, m.PrefillDone("p1", first.work_id, (), 0, 50))
    bench.tokens(first, 100, 110, 120)
    bench.retry(150, m.WorkerLost("d1"))
    bench.begin(second, at_ms=150, decode="d2")
    bench.event(210, m.PrefillDone("p1", second.work_id, (), 0, 20))
    bench.tokens(second, 210, 220, first_index=3, is_last=True)
    bench.end(220)
    told = bench.told()
    assert [work.outcome for work in told.works] == [WorkOutcome.RETRIED, WorkOutcome.COMPLETED]
    assert (told.works[0].end_reason, told.works[0].failed_worker_id) == ("d1 was lost", "d1")
    assert told.works[0].end_ms == pytest.approx(150)
    assert told.is_contiguous(0)
    (pause,) = told.pauses(0)
    assert pause == pytest.approx((120, 210))
    assert (told.num_attempts, told.works[1].num_prompt_tokens) == (2, 43)
    unreported = told.works[0].span(SpanKind.TRANSFER)
    assert unreported is not None
    assert unreported.unreported, "the transfer's end was never heard of"


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (m.WorkFailed("p1", WorkId("r", 1), FailureKind.TRANSFER, "no answer"), "p1 could not transfer the KV: no answer"),
        (m.WorkFailed("d1", WorkId("r", 1), FailureKind.OUT_OF_CAPACITY, "full"), "d1 had no room: full"),
        (m.TimerFired(1), "the KV transfer was not completed in time"),
        (m.DecodeTokens("d1", ()), "d1 left out a token"),
    ],
)
def test_an_attempt_that_was_given_up_says_why(cause: m.Event, reason: str) -> None:
    bench = Bench()
    bench.begin(make_work())
    bench.retry(90, cause)
    assert bench.told().works[0].end_reason == reason


def test_a_request_that_fails_says_so_at_what_was_running() -> None:
    bench = Bench()
    bench.begin(make_work())
    bench.end(80, RequestState.FAILED, OverloadedError("read faster"))
    (work,) = bench.told().works
    assert (work.outcome, work.end_reason) == (WorkOutcome.ENDED, "read faster")
    assert work.end_ms == pytest.approx(80)


def test_while_a_request_runs_its_open_phase_goes_on_until_now() -> None:
    bench = Bench()
    bench.begin(make_work())
    span = bench.told(now_ms=500).works[0].span(SpanKind.PREFILL)
    assert span is not None
    assert span.end_ms == pytest.approx(500)
    assert span.unreported
    assert not bench.told(500).ended


def test_a_transfer_that_is_reported_after_the_last_token_belongs_to_the_work_still() -> None:
    bench, work = Bench(), make_work()
    bench.begin(work)
    bench.event(100, m.PrefillDone("p1", work.work_id, ()))
    bench.tokens(work, 100, 101, is_last=True)
    bench.event(105, m.TransferDone("p1", work.work_id, 64, 2.0, 1.0, 2.0, "grpc"))
    bench.end(105)
    assert bench.told().works[0].kv_bytes == 64


def test_reports_of_an_attempt_that_was_given_up_change_nothing() -> None:
    bench, work = Bench(), make_work()
    bench.begin(work)
    bench.retry(90, m.WorkerLost("d1"))
    before = bench.told()
    bench.event(95, m.PrefillDone("p1", work.work_id, (), 1, 2, (ChunkTime(0, 1, 0, 1),)))
    bench.event(95, m.TransferDone("p1", work.work_id, 64))
    assert bench.told() == before


def test_a_long_output_keeps_few_marks_and_all_counts() -> None:
    bench, work, num_tokens = Bench(), make_work(), 5000
    bench.begin(work)
    bench.tokens(work, *range(100, 100 + num_tokens))
    (run,) = bench.told().works[0].token_runs
    assert run.num_tokens == num_tokens
    assert MAX_MARKS // 2 < len(run.mark_ms) <= MAX_MARKS
    assert list(run.mark_ms) == pytest.approx([100 + number * run.mark_stride for number in range(len(run.mark_ms))], rel=1e-4)


def test_many_attempts_and_chunks_stay_within_bounds() -> None:
    bench, chunks = Bench(), tuple(ChunkTime(number, number + 1, number, number + 1) for number in range(MAX_CHUNK_TIMES))
    for attempt in range(1, 2 * MAX_WORKS + 1):
        work = make_work(attempt)
        bench.begin(work, at_ms=attempt * 10)
        bench.event(attempt * 10 + 40, m.PrefillDone("p1", work.work_id, (), 0, 5, chunks))
        bench.retry(attempt * 10 + 41, m.WorkerLost("d1"), attempt + 1)
    told = bench.told(1e5)
    assert len(told.works) == MAX_WORKS
    assert told.num_forgotten_works == MAX_WORKS
    assert [told.works[0].attempt, told.works[-1].attempt] == [1, 2 * MAX_WORKS], "the first one and the latest"
    num_chunks = sum(len(each.prompt_chunks) for each in told.works)
    assert 0 < num_chunks <= MAX_CHUNKS
    assert told.works[-1].prompt_chunks, "of the latest"


def test_sequences_of_a_later_attempt_are_told_apart() -> None:
    bench = Bench()
    first, second = make_work(2, 1, 0), make_work(2, 2, 1)
    bench.begin(first)
    bench.begin(second, decode="d2")
    bench.tokens(first, 100, first_index=1, is_last=True)
    bench.tokens(second, 101, first_index=2, sequence=1)
    told = bench.told()
    assert [work.outcome for work in told.works] == [WorkOutcome.COMPLETED, WorkOutcome.RUNNING]
    assert [[run.sequence for run in work.token_runs] for work in told.works] == [[0], [1]]


def test_a_gateway_keeps_the_last_timelines_and_adds_up_what_travelled() -> None:
    timelines, work = Timelines(max_requests=2), make_work()
    for number in range(3):
        bench = Bench()
        bench.timeline = timelines.begin(f"r{number}", BEGIN)
        bench.begin(work)
        bench.event(100, m.PrefillDone("p1", work.work_id, ()))
        bench.tokens(work, 100, 101)
        bench.event(110, m.TransferDone("p1", work.work_id, 1000, wire_ms=2.0))
        timelines.note_ended(f"r{number}")
    assert [timelines.find(f"r{number}") is None for number in range(3)] == [True, False, False]
    ((prefill, decode, total),) = timelines.transfers()
    assert (prefill, decode, total.num_transfers, total.kv_bytes, total.wire_ms) == ("p1", "d1", 3, 3000, 6.0)
    assert timelines.total_output_tokens == 6
