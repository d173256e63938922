"""Every error that kvrelay raises on purpose.

    KvrelayError
    ├── InvalidRequestError        a field of a request is wrong            INVALID_ARGUMENT
    ├── ModelNotFoundError         no worker serves the named model         NOT_FOUND
    ├── RequestNotFoundError       no such request is known                 NOT_FOUND
    ├── IdempotencyConflictError   the key was used with another body       ALREADY_EXISTS
    ├── PreconditionError          the model or cluster cannot do this      FAILED_PRECONDITION
    │   ├── FingerprintError       sender and receiver have other models
    │   ├── NoChatTemplateError    chat on a model without a template
    │   └── SupersededError        another attempt or owner has the request
    ├── TicketError                the ticket gives no right to this        PERMISSION_DENIED
    ├── TransferError              a KV push broke its contract             DATA_LOSS
    ├── UnreadableStateError       Redis holds something else than state    DATA_LOSS
    ├── OverloadedError            refused for load; come again later       RESOURCE_EXHAUSTED
    │   └── StoreFullError         Redis is out of memory
    ├── OutOfBlocksError           the pool has too few free blocks         RESOURCE_EXHAUSTED
    ├── UnavailableError           no worker or store can be reached        UNAVAILABLE
    │   └── StateLostError         Redis lost this request's last writes
    │       └── FrameGapError      frames before the appended ones are missing
    ├── DeadlineError              the request's deadline passed            DEADLINE_EXCEEDED
    ├── CancelledRequestError      the request was cancelled                CANCELLED
    ├── UnsupportedError           not offered by this server               UNIMPLEMENTED
    ├── InternalError              a defect; the log has the detail         INTERNAL
    └── StartupError               a process cannot start; says what to do  (never on the wire)
        ├── ConfigError            a setting is wrong
        └── ModelLoadError         a model folder is broken or unsupported

`kvrelay.rpc` maps them to gRPC statuses; no other place does. Messages never carry internal detail.
"""

ERROR_DOMAIN = "kvrelay"


class KvrelayError(Exception):
    """Base of all errors. The message is a sentence for a person and says what to do next."""

    reason = "INTERNAL"
    """Constant of the ErrorInfo that goes to the client."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequestError(KvrelayError):
    """A field of a request is wrong. `field` is its path in the request."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


class ModelNotFoundError(KvrelayError):
    """No worker serves the model that was asked for."""

    reason = "MODEL_NOT_FOUND"


class RequestNotFoundError(KvrelayError):
    """No request of that id is known, or it is older than its retention."""

    reason = "REQUEST_NOT_FOUND"


class IdempotencyConflictError(KvrelayError):
    """The idempotency key was used before with another body."""

    reason = "IDEMPOTENCY_CONFLICT"


class PreconditionError(KvrelayError):
    """The model or the cluster is in no state to do what was asked; trying again does not help."""

    reason = "FAILED_PRECONDITION"


class FingerprintError(PreconditionError):
    """Sender and receiver serve different models, or the same one differently."""

    reason = "FINGERPRINT_MISMATCH"


class NoChatTemplateError(PreconditionError):
    """Chat messages were sent to a model that has no chat template."""

    reason = "NO_CHAT_TEMPLATE"


class SupersededError(PreconditionError):
    """A newer attempt, another owner or the request's end makes this write void."""

    reason = "SUPERSEDED"


class TicketError(KvrelayError):
    """A push showed a ticket that is unknown, used up or of another attempt."""

    reason = "TICKET_REFUSED"


class TransferError(KvrelayError):
    """A KV push broke its contract: a chunk out of range, twice corrupt, missing or too many."""

    reason = "TRANSFER_FAILED"


class UnreadableStateError(KvrelayError):
    """What Redis holds where a request's state should be is something else: somebody else wrote there, or a newer version did."""

    reason = "STATE_UNREADABLE"


class OverloadedError(KvrelayError):
    """Refused for load. `retry_after_ms` goes to the client as RetryInfo."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class StoreFullError(OverloadedError):
    """Redis is at its maxmemory and evicts nothing: state cannot be kept, so no new work is taken."""

    reason = "STATE_STORE_FULL"


class OutOfBlocksError(KvrelayError):
    """The pool has fewer free blocks than are needed."""

    reason = "OUT_OF_BLOCKS"


class UnavailableError(KvrelayError):
    """Something that is needed cannot be reached now. `retry_after_ms`, where it is known, goes to the client as RetryInfo."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class StateLostError(UnavailableError):
    """Redis lost writes about a request, in a failover or a restart. Its owner writes them again."""

    reason = "STATE_LOST"


class FrameGapError(StateLostError):
    """Frames before the appended ones are missing in a request's log, which has `num_frames`."""

    reason = "STATE_LOST"

    def __init__(self, message: str, num_frames: int) -> None:
        super().__init__(message)
        self.num_frames = num_frames


class DeadlineError(KvrelayError):
    """The request's deadline passed before it was done."""

    reason = "DEADLINE"


class CancelledRequestError(KvrelayError):
    """The request was cancelled, by its client or through CancelRequest."""

    reason = "CANCELLED"


class UnsupportedError(KvrelayError):
    """The server does not offer this."""

    reason = "UNSUPPORTED"


class InternalError(KvrelayError):
    """A defect of the server."""

    reason = "INTERNAL"


class StartupError(KvrelayError):
    """A process cannot start."""

    reason = "STARTUP"


class ConfigError(StartupError):
    """A setting is wrong; the message names the setting, its value and where it came from."""

    reason = "CONFIG"


class ModelLoadError(StartupError):
    """A model folder is missing, broken, or of an architecture that cannot be served."""

    reason = "MODEL_LOAD"
