"""How processes serve and dial gRPC: options, health, reflection."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvrelay.errors import StartupError
from kvrelay.network.bearer_channel import BearerChannel
from kvrelay.network.call_interceptor import CallInterceptor
from kvrelay.network.connection_limits import MAX_MESSAGE_BYTES, ConnectionLimits
from kvrelay.network.health_service import HealthService
from kvrelay.network.host_port import join_host_port
from kvrelay.network.listening import check_port
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.guard import CallGuard

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
"""Newer clients ask this name first. Its messages are those of v1alpha."""

_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second process on the same port must fail, not share it
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    # Clients ping to measure bandwidth while they read. Without this, one that reads old data while
    # nothing new is sent would be cut off for "too many pings", with all its streams.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)

# Larger reads and frames. Each read takes memory of this size at once: not for many connections.
_BULK_OPTIONS = (
    ("grpc.http2.max_frame_size", 1024 * 1024),
    ("grpc.experimental.tcp_read_chunk_size", 256 * 1024),
    ("grpc.experimental.tcp_min_read_chunk_size", 64 * 1024),
)

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    # A ping that measures bandwidth has a minute by default, and delays keepalive pings: a hanging
    # server, or a cut network, would be noticed a minute later.
    ("grpc.http2.ping_timeout_ms", 5000),
    # One connection per channel: closing a channel closes it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, the most time of an attempt to connect, up to the first answer. It is long
    # because a busy server is not an absent one.
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True)
class BoundServer:
    server: grpc.aio.Server
    port: int
    health: HealthService

    async def set_serving(self, serving: bool, service: str = "") -> None:
        """The empty name is the whole process."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set(service, status)


def create_server(
    *, takes_bulk: bool = False, guard: CallGuard | None = None, limits: ConnectionLimits | None = None
) -> grpc.aio.Server:
    """Its handlers may raise KvrelayError: clients get the rich status.

    `takes_bulk` suits large messages over few connections. Without a guard every caller is LOCAL.
    """
    options = (
        *_SERVER_OPTIONS,
        *(limits or ConnectionLimits()).options,
        *(_BULK_OPTIONS if takes_bulk else ()),
    )
    return grpc.aio.server(interceptors=[CallInterceptor(guard)], options=options)


def bind_server(
    server: grpc.aio.Server,
    host: str,
    port: int,
    service_names: Iterable[str],
    credentials: grpc.ServerCredentials | None = None,
    *,
    reflects: bool = False,
) -> BoundServer:
    """Adds health, and binds the port. Without credentials it speaks plain text."""
    health_servicer = HealthService()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if reflects:
        _add_reflection(server, (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME))
    return BoundServer(server, bind_port(server, host, port, "--port", credentials), health_servicer)


def bind_port(
    server: grpc.aio.Server, host: str, port: int, flag: str, credentials: grpc.ServerCredentials | None
) -> int:
    """`flag` sets the port."""
    # gRPC does not say why it fails, nor that it skips one of a name's addresses.
    check_port(host, port, flag)
    place = join_host_port(host, port)
    try:
        return server.add_insecure_port(place) if credentials is None else server.add_secure_port(place, credentials)
    except RuntimeError as failure:
        raise StartupError(
            f"cannot listen on {place}: gRPC does not say why; choose another port with {flag}"
        ) from failure


def _add_reflection(server: grpc.aio.Server, service_names: tuple[str, ...]) -> None:
    reflection.enable_server_reflection(service_names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(service_names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )


def create_channel(
    address: str, *, use_proxy: bool = False, credentials: ChannelCredentials | None = None
) -> grpc.aio.Channel:
    """A channel with a connection of its own. `use_proxy` takes the environment's HTTP proxy."""
    options = _channel_options(use_proxy, credentials)
    if credentials is None or credentials.tls is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, credentials.tls, options=options)
    if credentials is None or credentials.prover is None:
        return channel
    return BearerChannel(channel, partial(credentials.prover, address))


def create_sync_channel(
    address: str, *, use_proxy: bool = False, credentials: ChannelCredentials | None = None
) -> grpc.Channel:
    options = _channel_options(use_proxy, credentials)
    if credentials is None or credentials.tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials.tls, options=options)


def _channel_options(use_proxy: bool, credentials: ChannelCredentials | None) -> tuple[tuple[str, int | str], ...]:
    # By default gRPC uses the proxy of grpc_proxy, https_proxy or http_proxy for all connections,
    # even to this machine.
    options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(use_proxy)))
    if credentials is None or credentials.server_name is None:
        return options
    return (*options, ("grpc.ssl_target_name_override", credentials.server_name))
