"""What runs around each handler of a server: the guard, the caller's trace, typed errors.

All but KvrelayErrors are logged, and hidden from clients.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from kvrelay.core.trace_context import adopt
from kvrelay.errors import InternalError, InvalidRequestError, KvrelayError
from kvrelay.security.guard import CallGuard, named_tenant
from kvrelay.security.principal import LOCAL, Principal, current_principal, set_current_principal
from kvrelay.wire.errors import DETAILS_METADATA_KEY, status_of

Context = Any  # grpc.aio.ServicerContext, which is generic for type checkers only

_log = structlog.get_logger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the behaviour of handlers, because only a call's context knows the peer."""

    def __init__(self, guard: CallGuard | None) -> None:
        self._guard = guard
        self._guarded: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any] | None]] = {}
        """Handlers and what was made of them, by method: calls that end at once cost little more."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        known, guarded = self._guarded.get(method, (None, None))
        if known is not handler:
            guarded = self._guard_handler(method, handler)
            self._guarded[method] = (handler, guarded)
        return guarded

    def _guard_handler(self, method: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        make_handler, behaviour = _behaviour_of(handler)
        call = _GuardedCall(self._guard, method, handler, behaviour)
        streams = bool(handler.response_streaming)
        guarded: grpc.RpcMethodHandler[Any, Any] = make_handler(
            call.answer_stream if streams else call.answer,
            request_deserializer=call.deserialize if handler.request_streaming else _unread,
            response_serializer=_accept_bytes(handler.response_serializer) if streams else handler.response_serializer,
        )
        return guarded


class _GuardedCall:
    def __init__(self, guard: CallGuard | None, method: str, handler: Any, behaviour: Callable[..., Any]) -> None:
        self._guard = guard
        self._method = method
        self._behaviour = behaviour
        self._takes_stream = bool(handler.request_streaming)
        self.deserialize = _typed_failure(handler.request_deserializer)

    async def answer(self, request: Any, context: Context) -> Any:
        try:
            with self._admitted(context) as principal:
                return await self._behaviour(self._read(request, principal), context)
        except grpc.aio.AbortError:
            raise
        except Exception as failure:
            await _abort(context, failure, self._method)

    async def answer_stream(self, request: Any, context: Context) -> None:
        try:
            with self._admitted(context) as principal:
                # A handler is a generator, or a coroutine that writes to the context.
                answer = self._behaviour(self._read(request, principal), context)
                if isinstance(answer, Awaitable):
                    await answer
                    return
                async with aclosing(answer):
                    async for response in answer:
                        await context.write(response)
        except grpc.aio.AbortError:
            raise
        except Exception as failure:
            await _abort(context, failure, self._method)

    @contextmanager
    def _admitted(self, context: Context) -> Iterator[Principal]:
        metadata = context.invocation_metadata() or ()
        if self._guard is None:
            if (tenant := named_tenant(metadata)) is not None:
                set_current_principal(LOCAL.speaking_for(tenant))
            adopt(metadata)
            yield current_principal()
            return
        principal = self._guard.check(self._method, metadata, context.auth_context(), context.peer())
        set_current_principal(principal)
        adopt(metadata)
        with self._guard.following(principal):
            yield principal

    def _read(self, request: Any, principal: Principal) -> Any:
        if not self._takes_stream:
            return self.deserialize(request.pop())
        if self._guard is None or principal.expires_at_s is None:
            return request
        return _while_valid(request, self._guard, principal)


async def _while_valid(requests: AsyncIterator[Any], guard: CallGuard, principal: Principal) -> AsyncIterator[Any]:
    async for request in requests:
        guard.check_expiry(principal)
        yield request


def _unread(data: bytes) -> list[bytes]:
    """A single request, which is read after the guard has run; taken out, its bytes are freed."""
    return [data]


def _behaviour_of(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, handler.stream_stream
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _typed_failure(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """A deserializer that fails with InvalidRequestError: unreadable bytes are the client's mistake."""

    def deserialize(data: bytes) -> Any:
        try:
            return data if deserializer is None else deserializer(data)
        except DecodeError as failure:
            problem = (
                "cannot be read as a message of this call; send what the service's proto says, with strings in UTF-8"
            )
            raise InvalidRequestError("request", problem) from failure

    return deserialize


def _accept_bytes(serializer: Any) -> Callable[[Any], bytes]:
    """A stream's handler may write bytes that several streams share."""

    def serialize(message: Any) -> bytes:
        return message if type(message) is bytes else serializer(message)

    return serialize


async def _abort(context: Context, failure: Exception, method: str) -> None:
    error = failure
    if not isinstance(error, KvrelayError):
        _log.error("handler failed", method=method, exc_info=failure)
        error = InternalError("internal error; the server's log has the detail")
    _forget_frames(failure)
    status = status_of(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((DETAILS_METADATA_KEY, status.SerializeToString()),))


def _forget_frames(failure: BaseException | None) -> None:
    """gRPC keeps a call's error until garbage is collected, and so the message in the frames of it
    and of its causes.
    """
    while failure is not None:
        failure.__traceback__ = None
        failure = failure.__cause__ or failure.__context__
