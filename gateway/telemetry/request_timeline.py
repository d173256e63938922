"""Records what happened to one request, from its lifecycle's events and actions. Pure and bounded.

    events, actions, tokens ──► RequestTimeline ──► timeline_spans.timeline_of ──► Timeline

Of workers' reports, durations and times of arrival count, because their clocks are not trusted.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.lifecycle import events
from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.job import FailureKind, Job, JobId, SequenceToken
from kvrelay.core.request_state import RequestState
from kvrelay.core.timeline import JobOutcome, Phases
from kvrelay.errors import KvrelayError

MAX_JOBS = 64
"""The first job and the latest ones are kept."""
MAX_MARKS = 512
"""Per run. When full, every second one is dropped."""
MAX_MARKS_OF_MANY = 64
"""For requests with more than `MANY_RUNS` runs."""
MANY_RUNS = 8
MAX_CHUNKS = 512
"""Of all jobs. The oldest jobs lose theirs first."""

_FAILURES = {
    FailureKind.OUT_OF_CAPACITY: "had no room",
    FailureKind.TRANSFER: "could not transfer the KV",
    FailureKind.DRAINING: "was draining",
    FailureKind.INVALID: "could not serve the input",
    FailureKind.DEADLINE: "ran out of time",
    FailureKind.INTERNAL: "failed by a defect",
    FailureKind.SUPERSEDED: "had seen a newer attempt",
    FailureKind.UNPROVEN: "did not know whose the request is",
}
_ENDS = {
    RequestState.SUCCEEDED: "",
    RequestState.CANCELLED: "the request was cancelled",
    RequestState.EXPIRED: "the deadline passed",
}


@dataclass(slots=True)
class TokenMarks:
    """Every `stride`-th token has its time in `marks`."""

    first_index: int
    max_marks: int
    first: float
    last: float = 0.0
    num_tokens: int = 0
    stride: int = 1
    marks: "array[float]" = field(default_factory=lambda: array("f"))

    def add(self, now: float) -> None:
        if self.num_tokens % self.stride == 0:
            if len(self.marks) == self.max_marks:
                del self.marks[1::2]
                self.stride *= 2
            if self.num_tokens % self.stride == 0:
                self.marks.append(now)
        self.num_tokens += 1
        self.last = now


@dataclass(slots=True)
class JobRecord:
    """Times are milliseconds since the request came; durations are the worker's."""

    job_id: JobId
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
    """Without `queue_ms`."""
    transfer: events.TransferDone | None = None
    transfer_done: float | None = None
    kv_bytes: int = 0
    prompt_chunks: tuple[ChunkTime, ...] = ()
    kv_chunks: tuple[ChunkTime, ...] = ()
    runs: dict[int, TokenMarks] = field(default_factory=dict)
    num_finished_sequences: int = 0
    ended: float | None = None
    outcome: JobOutcome = JobOutcome.RUNNING
    end_reason: str = ""
    failed_worker_id: str = ""

    def end(self, now: float, outcome: JobOutcome, reason: str = "", failed_worker_id: str = "") -> None:
        """Later ends are ignored."""
        if self.ended is None:
            self.ended, self.outcome, self.end_reason, self.failed_worker_id = now, outcome, reason, failed_worker_id


class RequestTimeline:
    """`submit_time` is in monotonic seconds; `start_time_s` is the same moment since the epoch.

    `num_tokens_before` has the tokens of each sequence before a takeover.
    """

    def __init__(
        self,
        submit_time: float,
        start_time_s: float,
        num_tokens_before: tuple[int, ...] = (),
        on_transfer: Callable[[JobRecord, events.TransferDone], None] = lambda _record, _done: None,
    ) -> None:
        self.start_time_s = start_time_s
        self.num_tokens_before = num_tokens_before if any(num_tokens_before) else ()
        self.jobs: dict[JobId, JobRecord] = {}
        self.num_forgotten_jobs = 0
        self.num_tokens = 0
        self.ended: float | None = None
        self.phases: Phases | None = None
        """Set when the request succeeds."""
        self._submit_time = submit_time
        self._on_transfer = on_transfer
        self._num_runs = 0
        self._cause: events.Event | None = None
        self._current: JobRecord | None = None

    def ms_since_start(self, now: float) -> float:
        return (now - self._submit_time) * 1000

    def on_event(self, event: events.Event, now: float) -> None:
        """Call it before the lifecycle handles the event."""
        self._cause = event
        handle = _ON_EVENT.get(type(event))
        if handle is not None:
            record = self.jobs.get(event.job_id)  # type: ignore[union-attr]  # events in the table have one
            # Reports that come after the last token still count.
            if record is not None and record.outcome in (JobOutcome.RUNNING, JobOutcome.COMPLETED):
                handle(self, record, event, self.ms_since_start(now))

    def on_action(self, action: events.Action, now: float) -> None:
        """Call it before the action is carried out."""
        match action:
            case events.Route(job):
                self._begin(job, self.ms_since_start(now))
            case events.SendReserve(_, job) if record := self.jobs.get(job.job_id):
                record.reserve_sent = self.ms_since_start(now)
            case events.SendStartPrefill(worker_id, job) if record := self.jobs.get(job.job_id):
                record.prompt_sent, record.prefill_worker_id = self.ms_since_start(now), worker_id
            case events.SendRunPrompt(_, job_id) if record := self.jobs.get(job_id):
                record.prompt_sent, record.is_local_prompt = self.ms_since_start(now), True
                record.prefill_worker_id = None
            case events.SetState(RequestState.QUEUED, attempt) if self.jobs:
                self._retry(attempt, self.ms_since_start(now))

    def on_token(self, token: SequenceToken, is_last: bool, now: float) -> None:
        """`is_last` of its sequence."""
        at = (now - self._submit_time) * 1000
        record = self._current
        if record is None or record.job_id is not token.job_id:
            record = self._current = self.jobs.get(token.job_id)
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
                record.end(at, JobOutcome.COMPLETED)

    def on_end(self, state: RequestState, error: KvrelayError | None, now: float) -> None:
        self.ended = self.ms_since_start(now)
        reason = _ENDS.get(state) or (error.message if error is not None else "")
        worker_id = _failed_worker(self._cause) if state is RequestState.FAILED else ""
        outcome = JobOutcome.COMPLETED if state is RequestState.SUCCEEDED else JobOutcome.ENDED
        for record in self.jobs.values():
            record.end(self.ended, outcome, reason, worker_id)
        self._cause = self._current = None

    # --- jobs ---

    def _begin(self, job: Job, now: float) -> None:
        if job.job_id in self.jobs:
            return  # routed again after waiting for a worker
        if len(self.jobs) == MAX_JOBS:
            del self.jobs[list(self.jobs)[1]]
            self.num_forgotten_jobs += 1
        self.jobs[job.job_id] = JobRecord(job.job_id, job.num_sequences, len(job.token_ids), now)

    def _retry(self, attempt: int, now: float) -> None:
        reason, worker_id = _why_retried(self._cause), _failed_worker(self._cause)
        for record in self.jobs.values():
            if record.job_id.attempt < attempt:
                record.end(now, JobOutcome.RETRIED, reason, worker_id)

    def _routed(self, record: JobRecord, event: events.Routed, now: float) -> None:
        record.decode_worker_id, record.prefill_worker_id = event.decode_worker_id, event.prefill_worker_id

    def _reserved(self, record: JobRecord, event: events.Reserved, now: float) -> None:
        if record.reserved is None:
            record.reserved, record.num_cached_tokens = now, event.num_cached_tokens

    def _prefill_done(self, record: JobRecord, event: events.PrefillDone, now: float) -> None:
        if record.prompt_done is None:
            record.prompt_done, record.queue_ms, record.prefill_ms = now, event.queue_ms, event.prefill_ms
            record.prompt_chunks = event.chunks
            self._forget_chunks()

    def _transfer_done(self, record: JobRecord, event: events.TransferDone, now: float) -> None:
        self._on_transfer(record, event)
        record.transfer, record.transfer_done = event, now
        record.kv_bytes = max(record.kv_bytes, event.kv_bytes)
        record.kv_chunks = event.chunks
        self._forget_chunks()

    def _decode_started(self, record: JobRecord, event: events.DecodeStarted, now: float) -> None:
        if record.decode_started is not None:
            return
        record.decode_started = now
        record.kv_bytes = max(record.kv_bytes, event.kv_bytes)
        if record.is_local_prompt:
            # The decode worker includes its queue in prefill_ms.
            record.prompt_done, record.queue_ms = now, event.queue_ms
            record.prefill_ms = max(event.prefill_ms - event.queue_ms, 0.0)
            record.prompt_chunks = event.chunks
            self._forget_chunks()

    def _forget_chunks(self) -> None:
        num_chunks = sum(len(record.prompt_chunks) + len(record.kv_chunks) for record in self.jobs.values())
        for record in self.jobs.values():
            if num_chunks <= MAX_CHUNKS:
                return
            num_chunks -= len(record.prompt_chunks) + len(record.kv_chunks)
            record.prompt_chunks = record.kv_chunks = ()


_ON_EVENT: dict[type, Callable[[RequestTimeline, JobRecord, Any, float], None]] = {
    events.Routed: RequestTimeline._routed,
    events.Reserved: RequestTimeline._reserved,
    events.PrefillDone: RequestTimeline._prefill_done,
    events.TransferDone: RequestTimeline._transfer_done,
    events.DecodeStarted: RequestTimeline._decode_started,
}


def _why_retried(cause: events.Event | None) -> str:
    match cause:
        case events.WorkerLost(worker_id):
            return f"{worker_id} was lost"
        case events.JobFailed(worker_id, _, kind, message):
            return f"{worker_id} {_FAILURES[kind]}: {message}"
        case events.TimerFired():
            return "the KV transfer was not completed in time"
        case events.DecodeTokens(worker_id) | events.PrefillDone(worker_id):
            return f"{worker_id} left out a token"
    return ""


def _failed_worker(cause: events.Event | None) -> str:
    match cause:
        case (
            events.WorkerLost(worker_id)
            | events.JobFailed(worker_id)
            | events.DecodeTokens(worker_id)
            | events.PrefillDone(worker_id)
        ):
            return worker_id
    return ""
