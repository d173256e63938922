"""Events that a request's lifecycle handles, and actions that it returns. Pure values."""

from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.job import FailureKind, Job, JobId, SequenceToken
from kvrelay.core.request_state import RequestState
from kvrelay.errors import KvrelayError, QuotaError

# --- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted, or taken over."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Without a prefill worker, the decode worker computes the prompt."""

    job_id: JobId
    decode_worker_id: str
    prefill_worker_id: str | None


@dataclass(frozen=True, slots=True)
class NoWorker:
    job_id: JobId


@dataclass(frozen=True, slots=True)
class RouteAgain:
    """The wait is over, or workers changed."""


@dataclass(frozen=True, slots=True)
class GiveUpWaiting:
    """No worker took the request in time."""


@dataclass(frozen=True, slots=True)
class Reserved:
    worker_id: str
    job_id: JobId
    ticket: bytes
    push_address: str
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillDone:
    worker_id: str
    job_id: JobId
    tokens: tuple[SequenceToken, ...]
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TransferDone:
    worker_id: str
    job_id: JobId
    kv_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    wire_ms: float = 0.0
    transport: str = ""
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeStarted:
    worker_id: str
    job_id: JobId
    kv_bytes: int = 0
    prefill_ms: float = 0.0
    queue_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    worker_id: str
    tokens: tuple[SequenceToken, ...]


@dataclass(frozen=True, slots=True)
class JobFailed:
    """The worker has released all that it held of the job."""

    worker_id: str
    job_id: JobId
    kind: FailureKind
    message: str


class CrashVerdict(Enum):
    """See `poison_detector`."""

    NONE = auto()
    SUSPECTED = auto()
    """The request runs isolated until it makes progress."""
    CONFIRMED = auto()
    """A second worker died while it ran only this request."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Its jobs ended with its session."""

    worker_id: str
    verdict: CrashVerdict = CrashVerdict.NONE


@dataclass(frozen=True, slots=True)
class SuspicionCleared:
    worker_id: str


@dataclass(frozen=True, slots=True)
class StopFound:
    sequence: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    attempt: int


@dataclass(frozen=True, slots=True)
class ReadersBehind:
    behind: bool


@dataclass(frozen=True, slots=True)
class ReadersTooSlow:
    """The readers stayed behind for longer than the timeout."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The client hung up, or a CancelRequest came."""


@dataclass(frozen=True, slots=True)
class LeftByQuota:
    """The last client left, and its key has too many requests without one."""

    error: QuotaError


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's deadline passed."""


Event = (
    Started
    | Routed
    | NoWorker
    | RouteAgain
    | GiveUpWaiting
    | Reserved
    | PrefillDone
    | TransferDone
    | DecodeStarted
    | DecodeTokens
    | JobFailed
    | WorkerLost
    | SuspicionCleared
    | StopFound
    | TimerFired
    | ReadersBehind
    | ReadersTooSlow
    | CancelRequested
    | LeftByQuota
    | DeadlinePassed
)

# --- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """Choose workers, but no excluded one and no avoided (decode, prefill) pair."""

    job: Job
    excluded_worker_ids: frozenset[str]
    avoided_pairs: frozenset[tuple[str, str]]
    uses_budget: bool = False
    """The attempt takes a retry from the gateway's budget."""


@dataclass(frozen=True, slots=True)
class SendReserve:
    worker_id: str
    job: Job


@dataclass(frozen=True, slots=True)
class SendStartPrefill:
    worker_id: str
    job: Job
    ticket: bytes
    push_address: str
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SendRunPrompt:
    worker_id: str
    job_id: JobId


@dataclass(frozen=True, slots=True)
class SendCancel:
    worker_id: str
    job_id: JobId


@dataclass(frozen=True, slots=True)
class SendFinishSequence:
    worker_id: str
    job_id: JobId
    sequence: int


@dataclass(frozen=True, slots=True)
class SendSetPaused:
    worker_id: str
    job_id: JobId
    paused: bool


@dataclass(frozen=True, slots=True)
class Emit:
    token: SequenceToken


@dataclass(frozen=True, slots=True)
class SetState:
    state: RequestState
    attempt: int
    decode_worker_id: str | None
    prefill_worker_id: str | None


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Post RouteAgain after `delay_ms`, or once the workers change."""

    delay_ms: int


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Post TimerFired after `delay_ms`."""

    attempt: int
    delay_ms: int


@dataclass(frozen=True, slots=True)
class AvoidPair:
    """A transfer over the pair failed."""

    decode_worker_id: str
    prefill_worker_id: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The last action. `error` is None on success."""

    state: RequestState
    error: KvrelayError | None


Action = (
    Route
    | SendReserve
    | SendStartPrefill
    | SendRunPrompt
    | SendCancel
    | SendFinishSequence
    | SendSetPaused
    | Emit
    | SetState
    | RetryLater
    | StartTimer
    | AvoidPair
    | Finish
)
