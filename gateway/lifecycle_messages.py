"""What goes into a request's lifecycle and what comes out: plain values, without clock, wire or task.

Events name the worker that they come from, so that what a worker says about work that is not its own is dropped.
"""

from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.chunk_times import ChunkTime
from kvrelay.errors import KvrelayError
from kvrelay.request_state import RequestState
from kvrelay.sampling_params import SamplingParams
from kvrelay.work import FailureKind, SequenceToken, Work, WorkId


@dataclass(frozen=True, slots=True)
class LifecycleRequest:
    """What the lifecycle needs to know of a request. `emitted` and `finished_sequences` are set when it is taken over."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str = ""
    attempt: int = 1
    emitted: tuple[tuple[int, ...], ...] = ()
    """Token ids of each sequence that the client has already."""
    finished_sequences: frozenset[int] = frozenset()


@dataclass(slots=True)
class AttemptReport:
    """What workers reported of the current attempt's first work; times in milliseconds."""

    num_cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    wire_ms: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""
    prefilled_on_decode_worker: bool = False
    prefill_worker_id: str | None = None
    decode_worker_id: str | None = None


# --- events -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The request was admitted, or taken over."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Workers were chosen; without a prefill worker, the decode worker computes the prompt itself."""

    work_id: WorkId
    decode_worker_id: str
    prefill_worker_id: str | None


@dataclass(frozen=True, slots=True)
class NoWorker:
    """No worker can take the work now."""

    work_id: WorkId


@dataclass(frozen=True, slots=True)
class RouteAgain:
    """The time to wait is over, or the workers have changed."""


@dataclass(frozen=True, slots=True)
class GiveUpWaiting:
    """The request has waited for a worker as long as it may."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A decode worker set blocks aside."""

    worker_id: str
    work_id: WorkId
    ticket: bytes
    push_address: str
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """A prefill worker sampled the first tokens."""

    worker_id: str
    work_id: WorkId
    tokens: tuple[SequenceToken, ...]
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferDone:
    """A prefill worker delivered the whole KV cache."""

    worker_id: str
    work_id: WorkId
    kv_bytes: int = 0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    wire_ms: float = 0.0
    transport: str = ""
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeStarted:
    """The sequences run on the decode worker."""

    worker_id: str
    work_id: WorkId
    kv_bytes: int = 0
    prefill_ms: float = 0.0
    queue_ms: float = 0.0
    chunks: tuple[ChunkTime, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """This request's tokens of one step of a decode worker."""

    worker_id: str
    tokens: tuple[SequenceToken, ...]


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """A worker gave the work up and holds nothing of it any more."""

    worker_id: str
    work_id: WorkId
    kind: FailureKind
    message: str


class Blame(Enum):
    """What the end of a worker says about a request; see `gateway.suspicion`."""

    NONE = auto()
    SUSPECT = auto()
    """The worker may have died of the request: it is to run alone until it has got further."""
    GUILTY = auto()
    """It ran alone, because it was a suspect, and the worker died again."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The session with a worker ended, and with it all work on it."""

    worker_id: str
    blame: Blame = Blame.NONE


@dataclass(frozen=True, slots=True)
class Cleared:
    """That worker did not die of the request: it lives, or died of another one."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class StopFound:
    """A stop string completed in the sequence's text."""

    sequence: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer that was asked for by `StartTimer` of that attempt ran off."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReadersBehind:
    """Its readers are far behind the tokens, or have caught up."""

    behind: bool


@dataclass(frozen=True, slots=True)
class ReadersTooSlow:
    """They have been far behind for longer than is waited for."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The client, or somebody through CancelRequest, wants no more of it."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is over."""


Event = (
    Start
    | Routed
    | NoWorker
    | RouteAgain
    | GiveUpWaiting
    | Reserved
    | PrefillDone
    | TransferDone
    | DecodeStarted
    | DecodeTokens
    | WorkFailed
    | WorkerLost
    | Cleared
    | StopFound
    | TimerFired
    | ReadersBehind
    | ReadersTooSlow
    | CancelRequested
    | DeadlinePassed
)

# --- actions ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """Choose workers for the work, none of `excluded_worker_ids`, and no (decode, prefill) of `avoided_pairs`.

    A work that runs alone gets no prefill worker.
    """

    work: Work
    excluded_worker_ids: frozenset[str]
    avoided_pairs: frozenset[tuple[str, str]]
    is_paid_retry: bool = False
    """Another try after a worker's own failure: only if the gateway can afford one."""


@dataclass(frozen=True, slots=True)
class SendReserve:
    """To a decode worker."""

    worker_id: str
    work: Work


@dataclass(frozen=True, slots=True)
class SendStartPrefill:
    """To a prefill worker."""

    worker_id: str
    work: Work
    ticket: bytes
    push_address: str
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class SendRunPrompt:
    """To a decode worker that reserved."""

    worker_id: str
    work_id: WorkId


@dataclass(frozen=True, slots=True)
class SendCancel:
    """To a worker that may hold something of the work."""

    worker_id: str
    work_id: WorkId


@dataclass(frozen=True, slots=True)
class SendFinishSequence:
    """To a decode worker: the gateway ended the sequence."""

    worker_id: str
    work_id: WorkId
    sequence: int


@dataclass(frozen=True, slots=True)
class SendSetPaused:
    """To a decode worker on which the work runs: compute nothing of it, or go on."""

    worker_id: str
    work_id: WorkId
    paused: bool


@dataclass(frozen=True, slots=True)
class Emit:
    """The next token of a sequence, for the client."""

    token: SequenceToken


@dataclass(frozen=True, slots=True)
class SetState:
    """The request moved along an edge of `kvrelay.request_state`."""

    state: RequestState
    attempt: int
    decode_worker_id: str | None
    prefill_worker_id: str | None


@dataclass(frozen=True, slots=True)
class RetryLater:
    """No worker now: answer with RouteAgain after about `delay_ms`, or earlier when the workers change."""

    delay_ms: int


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Answer with TimerFired of that attempt after `delay_ms`."""

    attempt: int
    delay_ms: int


@dataclass(frozen=True, slots=True)
class AvoidPair:
    """KV did not get from the prefill to the decode worker: leave the pair alone for a while, for all requests."""

    decode_worker_id: str
    prefill_worker_id: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The one end of the request; nothing follows. `error` is None when it succeeded."""

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
