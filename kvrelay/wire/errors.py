"""The one map between kvrelay's errors and gRPC statuses.

A status carries google.rpc details: always ErrorInfo, BadRequest for a wrong field, RetryInfo if a
retry helps. Texts are cut, because clients accept at most 8 KiB of headers.
"""

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from kvrelay import errors
from kvrelay.errors import InvalidRequestError, KvrelayError, OverloadedError, UnavailableError

DETAILS_METADATA_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 1000
"""The headers have the message twice: as text, up to 3 characters per byte, and in base64."""
MAX_FIELD_BYTES = 200

_CODES: dict[type[KvrelayError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.RequestNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.IdempotencyConflictError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FingerprintError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NoChatTemplateError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SupersededError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.AccessDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TicketError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TransferError: grpc.StatusCode.DATA_LOSS,
    errors.UnreadableStateError: grpc.StatusCode.DATA_LOSS,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StoreFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfBlocksError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledRequestError: grpc.StatusCode.CANCELLED,
    errors.UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

_BY_REASON: dict[str, type[KvrelayError]] = {kind.reason: kind for kind in _CODES}

# A status without our ErrorInfo comes from gRPC itself or from a proxy.
_BY_CODE: dict[grpc.StatusCode, type[KvrelayError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.CancelledRequestError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.PreconditionError,
    grpc.StatusCode.UNAUTHENTICATED: errors.UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDeniedError,
}


def code_of(error: KvrelayError) -> grpc.StatusCode:
    """The code of its class or nearest base that has one; else INTERNAL."""
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), grpc.StatusCode.INTERNAL)


def status_of(error: KvrelayError) -> Status:
    details: list[ErrorInfo | BadRequest | RetryInfo] = [ErrorInfo(reason=error.reason, domain=errors.ERROR_DOMAIN)]
    if isinstance(error, InvalidRequestError):
        violation = BadRequest.FieldViolation(field=_cut(error.field, MAX_FIELD_BYTES), description=_cut(error.problem))
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError | UnavailableError) and error.retry_after_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(RetryInfo(retry_delay=delay))
    number: int = code_of(error).value[0]
    return Status(code=number, message=_cut(error.message), details=[_pack(detail) for detail in details])


def error_of(status: Status) -> KvrelayError:
    info, request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    kind = _BY_REASON.get(info.reason) if info.domain == errors.ERROR_DOMAIN else None
    if kind is None:
        return error_of_code(_code_of_number(status.code), status.message)
    if issubclass(kind, InvalidRequestError):
        violation = request.field_violations[0] if request.field_violations else BadRequest.FieldViolation()
        return kind(violation.field, violation.description)
    if issubclass(kind, OverloadedError):
        return kind(status.message, retry.retry_delay.ToMilliseconds())
    if issubclass(kind, UnavailableError) and retry.HasField("retry_delay"):
        return kind(status.message, retry.retry_delay.ToMilliseconds())
    return kind(status.message)


def error_of_reason(reason: str, message: str) -> KvrelayError | None:
    """None if this version has no error with that reason."""
    if reason not in _BY_REASON:
        return None
    detail = ErrorInfo(reason=reason, domain=errors.ERROR_DOMAIN)
    return error_of(Status(message=message, details=[_pack(detail)]))


def error_of_code(code: grpc.StatusCode, message: str) -> KvrelayError:
    kind = _BY_CODE.get(code, errors.InternalError)
    return kind(message or code.name)


def error_of_rpc(failure: grpc.RpcError) -> KvrelayError:
    assert isinstance(failure, grpc.Call | grpc.aio.AioRpcError), "a failed call knows its status"
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_METADATA_KEY and isinstance(value, bytes):
            return error_of(Status.FromString(value))
    return error_of_code(failure.code(), failure.details() or "")


def _cut(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """Cuts at a whole character. Half a surrogate pair, which messages cannot hold, becomes "?"."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore") + "..."


def _pack(detail: ErrorInfo | BadRequest | RetryInfo) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed


def _code_of_number(number: int) -> grpc.StatusCode:
    return next((code for code in grpc.StatusCode if code.value[0] == number), grpc.StatusCode.UNKNOWN)
