"""Remembers what happened to one request, from the events and actions of its lifecycle. Pure and bounded; callers tell the time.

    events, actions, tokens ──► RequestTimeline (what was seen) ──► timeline_spans.timeline_of (what is told)

Workers' clocks are not trusted: of their reports the durations are kept, and when the report came here.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway import lifecycle_messages as m
from kvrelay.chunk_times import ChunkTime
from kvrelay.errors import KvrelayError
from kvrelay.request_state import RequestState
from kvrelay.telemetry import Phases
from kvrelay.timeline import WorkOutcome
from kvrelay.work import FailureKind, SequenceToken, Work, WorkId

MAX_WORKS = 64
"""Works that are remembered: the first one and the latest."""
MAX_MARKS = 512
"""Times of tokens of one run; where there are more tokens, every second one is forgotten."""
MAX_MARKS_OF_MANY = 64
"""The same for a request with more than `MANY_RUNS` runs."""
MANY_RUNS = 8
MAX_CHUNKS = 512
"""Chunk times of all works together: those of the oldest works are forgotten first."""

_FAILURES = {
    FailureKind.OUT_OF_CAPACITY: "had no room",
    FailureKind.TRANSFER: "could not transfer the KV",
    FailureKind.DRAINING: "was draining",
    FailureKind.INVALID: "could not serve the input",
    FailureKind.DEADLINE: "ran out of time",
    FailureKind.INTERNAL: "failed by a defect",
    FailureKind.SUPERSEDED: "had seen a newer attempt",
}
_ENDS = {
    RequestState.SUCCEEDED: "",
    RequestState.CANCELLED: "the request was cancelled",
    RequestState.EXPIRED: "the deadline passed",
}


@dataclass(slots=True)
class TokenMarks:
    """Tokens of one sequence that came of one work, with the times of some."""

    first_index: int
    max_marks: int
    first: float
    last: float = 0.0
    num_tokens: int = 0
    stride: int = 1
    marks: "array[float]" = field(default_factory=lambda: array("f"))

    def add(self, now: float) -> None:
        """One more token."""
        if self.num_tokens % self.stride == 0:
            if len(self.marks) == self.max_marks:
                del self.marks[1::2]
                self.stride *= 2
            if self.num_tokens % self.stride == 0:
                self.marks.append(now)
        self.num_tokens += 1
        self.last = now


@dataclass(slots=True)
class WorkRecord:
    """What was seen of one work. Times are milliseconds since the request came; durations are its workers'."""

    work_id: WorkId
    num_sequences: int
    num_prompt_tokens: int
    began: float
    decode_worker_id: str | None = None
    prefill_worker_id: str | None = None
    reserve_sent: float | None = None
    reserved: float | None = None
    prompt_sent: float | None = None
    prompt_done: float | None = None
    decode_started: float | None = None
    is_local_prompt: bool = False
    num_cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    """The pass alone, without `queue_ms`."""
    transfer: m.TransferDone | None = None
    transfer_done: float | None = None
    kv_bytes: int = 0
    prompt_chunks: tuple[ChunkTime, ...] = ()
    kv_chunks: tuple[ChunkTime, ...] = ()
    runs: dict[int, TokenMarks] = field(default_factory=dict)
    num_finished_sequences: int = 0
    ended: float | None = None
    outcome: WorkOutcome = WorkOutcome.RUNNING
    end_reason: str = ""
    failed_worker_id: str = ""

    def end(self, now: float, outcome: WorkOutcome, reason: str = "", failed_worker_id: str = "") -> None:
        """It has come to its end, unless it had already."""
        if self.ended is None:
            self.ended, self.outcome, self.end_reason, self.failed_worker_id = now, outcome, reason, failed_worker_id


class RequestTimeline:
    """One request's.

    Args:
        submit_time: when it came, in monotonic seconds.
        start_time_s: the same in seconds since the epoch, for people.
        num_tokens_before: tokens of each sequence that were emitted elsewhere; empty for a new request.
        on_transfer: told of every transfer that a worker reports.
    """

    def __init__(
        self,
        submit_time: float,
        start_time_s: float,
        num_tokens_before: tuple[int, ...] = (),
        on_transfer: Callable[[WorkRecord, m.TransferDone], None] = lambda _record, _done: None,
    ) -> None:
        self.start_time_s = start_time_s
        self.num_tokens_before = num_tokens_before if any(num_tokens_before) else ()
        self.works: dict[WorkId, WorkRecord] = {}
        self.num_forgotten_works = 0
        self.num_tokens = 0
        self.ended: float | None = None
        self.phases: Phases | None = None
        """Set by whoever ends a request that succeeds."""
        self._submit_time = submit_time
        self._on_transfer = on_transfer
        self._num_runs = 0
        self._cause: m.Event | None = None
        self._current: WorkRecord | None = None
        """Whose token came last."""

    def ms_since_start(self, now: float) -> float:
        """A time in monotonic seconds as timelines have it."""
        return (now - self._submit_time) * 1000

    def note_event(self, event: m.Event, now: float) -> None:
        """Before the lifecycle handles it."""
        self._cause = event
        note = _EVENT_NOTES.get(type(event))
        if note is not None:
            record = self.works.get(event.work_id)  # type: ignore[union-attr]  # those of the table have one
            # What a sequence's workers report after its last token belongs to it still.
            if record is not None and record.outcome in (WorkOutcome.RUNNING, WorkOutcome.COMPLETED):
                note(self, record, event, self.ms_since_start(now))

    def note_action(self, action: m.Action, now: float) -> None:
        """Before it is carried out."""
        match action:
            case m.Route(work):
                self._begin(work, self.ms_since_start(now))
            case m.SendReserve(_, work) if record := self.works.get(work.work_id):
                record.reserve_sent = self.ms_since_start(now)
            case m.SendStartPrefill(worker_id, work) if record := self.works.get(work.work_id):
                record.prompt_sent, record.prefill_worker_id = self.ms_since_start(now), worker_id
            case m.SendRunPrompt(_, work_id) if record := self.works.get(work_id):
                record.prompt_sent, record.is_local_prompt, record.prefill_worker_id = self.ms_since_start(now), True, None
            case m.SetState(RequestState.QUEUED, attempt) if self.works:
                self._retry(attempt, self.ms_since_start(now))

    def note_token(self, token: SequenceToken, is_last: bool, now: float) -> None:
        """A token was emitted; `is_last` of its sequence."""
        at = (now - self._submit_time) * 1000
        record = self._current
        if record is None or record.work_id is not token.work_id:
            record = self._current = self.works.get(token.work_id)
            if record is None:
                return
        marks = record.runs.get(token.sequence)
        if marks is None:
            self._num_runs += 1
            max_marks = MAX_MARKS if self._num_runs <= MANY_RUNS else MAX_MARKS_OF_MANY
            marks = record.runs[token.sequence] = TokenMarks(token.index, max_marks, at)
        marks.add(at)
        self.num_tokens += 1
        if is_last:
            record.num_finished_sequences += 1
            if record.num_finished_sequences == record.num_sequences:
                record.end(at, WorkOutcome.COMPLETED)

    def note_end(self, state: RequestState, error: KvrelayError | None, now: float) -> None:
        """The request has ended. What workers still report is not waited for any more."""
        self.ended = self.ms_since_start(now)
        reason = _ENDS.get(state) or (error.message if error is not None else "")
        worker_id = _failed_worker(self._cause) if state is RequestState.FAILED else ""
        outcome = WorkOutcome.COMPLETED if state is RequestState.SUCCEEDED else WorkOutcome.ENDED
        for record in self.works.values():
            record.end(self.ended, outcome, reason, worker_id)
        self._cause = self._current = None

    # --- below: works -----------------------------------------------------------------------------------------------------------

    def _begin(self, work: Work, now: float) -> None:
        if work.work_id in self.works:
            return  # it has waited for a worker
        if len(self.works) == MAX_WORKS:
            del self.works[list(self.works)[1]]
            self.num_forgotten_works += 1
        self.works[work.work_id] = WorkRecord(work.work_id, work.num_sequences, len(work.token_ids), now)

    def _retry(self, attempt: int, now: float) -> None:
        reason, worker_id = _why_retried(self._cause), _failed_worker(self._cause)
        for record in self.works.values():
            if record.work_id.attempt < attempt:
                record.end(now, WorkOutcome.RETRIED, reason, worker_id)

    def _routed(self, record: WorkRecord, event: m.Routed, now: float) -> None:
        record.decode_worker_id, record.prefill_worker_id = event.decode_worker_id, event.prefill_worker_id

    def _reserved(self, record: WorkRecord, event: m.Reserved, now: float) -> None:
        if record.reserved is None:
            record.reserved, record.num_cached_tokens = now, event.num_cached_tokens

    def _prefill_done(self, record: WorkRecord, event: m.PrefillDone, now: float) -> None:
        if record.prompt_done is None:
            record.prompt_done, record.queue_ms, record.prefill_ms = now, event.queue_ms, event.prefill_ms
            record.prompt_chunks = event.chunks
            self._forget_chunks()

    def _transfer_done(self, record: WorkRecord, event: m.TransferDone, now: float) -> None:
        self._on_transfer(record, event)
        record.transfer, record.transfer_done = event, now
        record.kv_bytes = max(record.kv_bytes, event.kv_bytes)
        record.kv_chunks = event.chunks
        self._forget_chunks()

    def _decode_started(self, record: WorkRecord, event: m.DecodeStarted, now: float) -> None:
        if record.decode_started is not None:
            return
        record.decode_started = now
        record.kv_bytes = max(record.kv_bytes, event.kv_bytes)
        if record.is_local_prompt:
            # Here the worker counts its queue as a part of the pass.
            record.prompt_done, record.queue_ms = now, event.queue_ms
            record.prefill_ms = max(event.prefill_ms - event.queue_ms, 0.0)
            record.prompt_chunks = event.chunks
            self._forget_chunks()

    def _forget_chunks(self) -> None:
        num_chunks = sum(len(record.prompt_chunks) + len(record.kv_chunks) for record in self.works.values())
        for record in self.works.values():
            if num_chunks <= MAX_CHUNKS:
                return
            num_chunks -= len(record.prompt_chunks) + len(record.kv_chunks)
            record.prompt_chunks = record.kv_chunks = ()


_EVENT_NOTES: dict[type, Callable[[RequestTimeline, WorkRecord, Any, float], None]] = {
    m.Routed: RequestTimeline._routed,
    m.Reserved: RequestTimeline._reserved,
    m.PrefillDone: RequestTimeline._prefill_done,
    m.TransferDone: RequestTimeline._transfer_done,
    m.DecodeStarted: RequestTimeline._decode_started,
}


def _why_retried(cause: m.Event | None) -> str:
    match cause:
        case m.WorkerLost(worker_id):
            return f"{worker_id} was lost"
        case m.WorkFailed(worker_id, _, kind, message):
            return f"{worker_id} {_FAILURES[kind]}: {message}"
        case m.TimerFired():
            return "the KV transfer was not completed in time"
        case m.DecodeTokens(worker_id) | m.PrefillDone(worker_id):
            return f"{worker_id} left out a token"
    return ""


def _failed_worker(cause: m.Event | None) -> str:
    match cause:
        case m.WorkerLost(worker_id) | m.WorkFailed(worker_id) | m.DecodeTokens(worker_id) | m.PrefillDone(worker_id):
            return worker_id
    return ""
