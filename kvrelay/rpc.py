"""How every process serves and dials gRPC: options, error interceptor, health and reflection. Knows nothing of what is served."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvrelay.error_status import DETAILS_METADATA_KEY, status_of
from kvrelay.errors import InternalError, InvalidRequestError, KvrelayError, StartupError
from kvrelay.trace_context import adopt

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""What newer clients ask first: the messages of v1alpha under another name. The library has only the older name."""

_log = structlog.get_logger(__name__)

_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second process on the same port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    # Clients ping to measure the bandwidth while they read. One that reads old data while there is nothing new to send would be
    # cut off for "too many pings", and with it all its streams.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

# For few connections with large messages: fewer and larger reads and frames. A read takes memory of this size at once, so that
# servers of many connections do without.
_BULK_OPTIONS = (
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.experimental.tcp_read_chunk_size", 256 * 1024),
    ("grpc.experimental.tcp_min_read_chunk_size", 64 * 1024),
)

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    # Other pings, which measure the bandwidth, have a minute by default, and while one is under way none that asks for life
    # follows: a server that stands still, or a network that is cut, would be noticed a minute later.
    ("grpc.http2.ping_timeout_ms", 5000),
    ("grpc.use_local_subchannel_pool", 1),  # one connection per channel: closing a channel closes it
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name the time that one attempt to connect may take, up to the first answer: a busy server is not an absent one.
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True)
class BoundServer:
    """A server that listens, with the port that it got and its health."""

    server: grpc.aio.Server
    port: int
    health: health.aio.HealthServicer

    async def set_serving(self, serving: bool, service: str = "") -> None:
        """Sets what the health service answers; the empty name is the process as a whole."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set(service, status)


def create_server(*, takes_bulk: bool = False) -> grpc.aio.Server:
    """A server whose handlers may raise KvrelayError: clients get its rich status.

    Args:
        takes_bulk: whether few connections bring it large messages.
    """
    options = _SERVER_OPTIONS + _BULK_OPTIONS if takes_bulk else _SERVER_OPTIONS
    return grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)


def bind_server(server: grpc.aio.Server, host: str, port: int, service_names: Iterable[str]) -> BoundServer:
    """Adds health and reflection and listens; the caller starts the server.

    Raises:
        StartupError: the port is taken or the host is not this machine's.
    """
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    _add_reflection(server, (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    try:
        bound_port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as failure:
        message = (
            f"cannot listen on {host}:{port}: is the port taken? Free it, or choose another with --port (0 takes a free one)."
        )
        raise StartupError(message) from failure
    return BoundServer(server, bound_port, health_servicer)


def _add_reflection(server: grpc.aio.Server, service_names: tuple[str, ...]) -> None:
    reflection.enable_server_reflection(service_names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(service_names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler}),))


def create_channel(address: str) -> grpc.aio.Channel:
    """A channel with a connection of its own to host:port. The caller closes it."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def create_sync_channel(address: str) -> grpc.Channel:
    """The same for threads."""
    return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into rich statuses. Anything but a KvrelayError is a defect: logged, and hidden from clients.

    Bytes that are no message are the client's mistake too: by itself, gRPC answers them with UNKNOWN and logs a traceback.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        make_handler, behaviour = _behaviour_of(handler)
        guard = _guard_stream if handler.response_streaming else _guard_unary
        guarded: grpc.RpcMethodHandler[Any, Any] = make_handler(
            guard(behaviour, method),
            request_deserializer=_typed_failure(handler.request_deserializer, raises=bool(handler.request_streaming)),
            response_serializer=_accept_bytes(handler.response_serializer)
            if handler.response_streaming
            else handler.response_serializer,
        )
        return guarded


def _behaviour_of(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The constructor for a handler of the same kind, and the handler's function."""
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler, handler.stream_stream
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    return grpc.unary_unary_rpc_method_handler, handler.unary_unary


def _typed_failure(deserializer: Any, *, raises: bool) -> Any:
    """A deserializer whose failure is a KvrelayError: raised out of a stream's read; else in the request's place, for nothing
    guards what a single request's deserializer raises."""
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as failure:
            problem = "cannot be read as a message of this call; send what the service's proto says, with strings in UTF-8"
            unreadable = InvalidRequestError("request", problem)
            if raises:
                raise unreadable from failure
            return unreadable

    return deserialize


def _checked(request: Any) -> Any:
    """The request, if it could be read."""
    if isinstance(request, InvalidRequestError):
        raise request
    return request


def _accept_bytes(serializer: Any) -> Callable[[Any], bytes]:
    """A stream's handler may write what is serialized already: bytes that several streams share."""

    def serialize(message: Any) -> bytes:
        return message if type(message) is bytes else serializer(message)

    return serialize


def _guard_unary(behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        adopt(context.invocation_metadata() or ())
        try:
            return await behaviour(_checked(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as failure:
            await _abort(context, failure, method)

    return guarded


def _guard_stream(behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        adopt(context.invocation_metadata() or ())
        # HealthServicer.Watch and its like are coroutines that write to the context; ours are generators.
        try:
            answer = behaviour(_checked(request), context)
            if isinstance(answer, Awaitable):
                await answer
                return
            async for response in answer:
                yield response
        except grpc.aio.AbortError:
            raise
        except Exception as failure:
            await _abort(context, failure, method)

    return guarded


async def _abort(context: grpc.aio.ServicerContext[Any, Any], failure: Exception, method: str) -> None:
    if not isinstance(failure, KvrelayError):
        _log.error("handler failed", method=method, exc_info=failure)
        failure = InternalError("internal error; the server's log has the detail")
    # A request that failed is known for a while, with its error, which must not keep the frames and the call it was raised in.
    failure.__traceback__ = None
    status = status_of(failure)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((DETAILS_METADATA_KEY, status.SerializeToString()),))
