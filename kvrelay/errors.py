"""Every error that kvrelay raises on purpose. Messages carry no internal detail.

Only `kvrelay/wire/errors.py` maps them to statuses. A StartupError never goes over the wire.
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
    """A field of a request is wrong; `field` is its path."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


class ModelNotFoundError(KvrelayError):
    """No worker serves the named model."""

    reason = "MODEL_NOT_FOUND"


class RequestNotFoundError(KvrelayError):
    """The request is unknown, or older than its retention."""

    reason = "REQUEST_NOT_FOUND"


class IdempotencyConflictError(KvrelayError):
    """The idempotency key was used before with another body."""

    reason = "IDEMPOTENCY_CONFLICT"


class PreconditionError(KvrelayError):
    """The model or the cluster cannot do this; trying again does not help."""

    reason = "FAILED_PRECONDITION"


class FingerprintError(PreconditionError):
    """Sender and receiver serve different models, or the same one differently."""

    reason = "FINGERPRINT_MISMATCH"


class NoChatTemplateError(PreconditionError):
    """The model has no chat template."""

    reason = "NO_CHAT_TEMPLATE"


class SupersededError(PreconditionError):
    """A newer attempt, another owner or the request's end makes this write void."""

    reason = "SUPERSEDED"


class UnauthenticatedError(KvrelayError):
    """The caller proved nothing, or its key, token or certificate is not valid now."""

    reason = "UNAUTHENTICATED"


class AccessDeniedError(KvrelayError):
    """The caller is known, and may not do this."""

    reason = "ACCESS_DENIED"


class TicketError(KvrelayError):
    """A push's ticket is unknown, used up or of another attempt."""

    reason = "TICKET_REFUSED"


class TransferError(KvrelayError):
    """A chunk of a KV push is out of range, twice corrupt, missing or too many."""

    reason = "TRANSFER_FAILED"


class UnreadableStateError(KvrelayError):
    """Another program or a newer version wrote this request's state in Redis."""

    reason = "STATE_UNREADABLE"


class OverloadedError(KvrelayError):
    """Refused for load. `retry_after_ms` goes to the client as RetryInfo."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_ms: int = 1000) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class QuotaError(OverloadedError):
    """The caller's own limit is reached, whatever the load of others; `limit` names it."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, retry_after_ms: int = 1000, limit: str = "") -> None:
        super().__init__(message, retry_after_ms)
        self.limit = limit


class StoreFullError(OverloadedError):
    """Redis is at its maxmemory, so no new jobs are taken."""

    reason = "STATE_STORE_FULL"


class OutOfBlocksError(KvrelayError):
    """The pool has fewer free blocks than needed."""

    reason = "OUT_OF_BLOCKS"


class UnavailableError(KvrelayError):
    """A needed part cannot be reached now. `retry_after_ms`, if known, goes to the client as
    RetryInfo.
    """

    reason = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class StateLostError(UnavailableError):
    """Redis lost writes, in a failover or a restart. The request's owner writes them again."""

    reason = "STATE_LOST"


class FrameGapError(StateLostError):
    """A request's log has `num_frames`; frames before the appended ones are missing."""

    reason = "STATE_LOST"

    def __init__(self, message: str, num_frames: int) -> None:
        super().__init__(message)
        self.num_frames = num_frames


class DeadlineError(KvrelayError):
    """The request's deadline passed."""

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
    """A setting is wrong; the message names it, its value and where it came from."""

    reason = "CONFIG"


class ModelLoadError(StartupError):
    """A model folder is missing, broken, or of an unsupported architecture."""

    reason = "MODEL_LOAD"
