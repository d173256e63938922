"""The gateway process: builds its parts, serves, and drains."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable

import grpc
import structlog

from gateway.gateway import Gateway
from gateway.page.live_page import live_page
from gateway.page.try_box import TryBox
from gateway.protocols.registry import register_all
from gateway.service import InferenceService
from gateway.views import live_metrics
from kvrelay.config.settings import GatewaySettings
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.exposure import exposure_of, reminding, showing_health
from kvrelay.network.host_port import join_host_port, split_host_port
from kvrelay.network.http_bounds import HttpBounds
from kvrelay.network.http_server import AddRoutes, Health, serving_http
from kvrelay.network.own_places import OwnPlaces
from kvrelay.network.rpc import BoundServer, bind_port, bind_server, create_server
from kvrelay.observability.metrics.exposition import metrics_route
from kvrelay.observability.metrics.security_metrics import security_samples
from kvrelay.observability.tracing import create_tracing
from kvrelay.process import set_up_process, stop_on_signals
from kvrelay.runtime import event_loop
from kvrelay.runtime.freed_memory import give_back_freed_memory, trimming_memory
from kvrelay.runtime.garbage_collection import collecting_when_idle, keep_what_is_loaded
from kvrelay.runtime.loop_delay import measuring_delay
from kvrelay.runtime.watchdog import send_keepalives
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import inference_pb2_grpc

SERVICE_NAME = "kvrelay.v1.InferenceService"
STATE_STORE_NAME = "kvrelay.v1.StateStore"
"""Not a service: its health tells whether request state can be kept."""
HEALTH_INTERVAL_S = 0.2
LAST_ANSWERS_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises StartupError, which says what to change.
    """
    give_back_freed_memory()
    set_up_process(settings.server, "gateway")
    keep_what_is_loaded()
    event_loop.run(serve(settings))


async def serve(settings: GatewaySettings, stop: asyncio.Event | None = None) -> None:
    """Without `stop`, serves until a signal comes."""
    gateway_id = f"gateway-{secrets.token_hex(8)}"
    stop = stop or stop_on_signals()
    security = ProcessSecurity.of(settings.security, Role.GATEWAY, local_clients=settings.peers.local_clients)
    host = settings.server.host
    exposure = exposure_of_gateway(security, settings)
    async with RedisConnection(settings.server.required_redis_url(), settings.server.redis_timeout_ms) as connection:
        await connection.check()
        store = StateStore(connection, gateway_id, settings.requests.retention_ms)
        tracing = create_tracing(settings.server.otlp_endpoint, "gateway", gateway_id, settings.requests.trace_ratio)
        gateway = Gateway(
            gateway_id, settings, store, MemberRegistry(connection, settings.server.lease_ms), tracing, security.towards
        )
        server = create_server(guard=security.guard, limits=settings.connection_limits)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway), server)
        service_names = (SERVICE_NAME, *register_all(server, gateway))
        credentials = security.server_credentials()
        bound = bind_server(server, host, settings.server.port, service_names, credentials, reflects=True)
        gateway.address = address = settings.server.address_of(bound.port)
        security.listens(OwnPlaces(host, bound.port, address).__contains__)
        member = Member(gateway_id, MemberRole.GATEWAY, _peer_address(server, settings, security, bound.port))
        async with (
            _stopping(server),
            security.watching(),
            reminding(exposure, host),
            showing_health(bound, exposure, lambda: security.problems),
            gateway.running(),
            gateway.registry.lease(member),
            _health(bound, store, service_names),
        ):
            await server.start()
            async with (
                _serving_http(settings, gateway, security, store, exposure) as http_port,
                send_keepalives(settings.server.watchdog_socket),
                measuring_delay(gateway.metrics.loop_delay.observe),
                collecting_when_idle(lambda: not gateway.requests.num_running),
                trimming_memory(),
            ):
                _log.info("ready", address=address, http_port=http_port, gateway_id=gateway_id, redis=store.healthy)
                await stop.wait()
                await _drain(gateway, bound, service_names, settings.server.drain_timeout_ms)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    _log.info("stopped")


def exposure_of_gateway(security: ProcessSecurity, settings: GatewaySettings) -> str | None:
    """Raises StartupError where strangers would be a danger."""
    return exposure_of(settings.server.host, security.danger, insecure=settings.security.insecure)


def _peer_address(
    server: grpc.aio.Server, settings: GatewaySettings, security: ProcessSecurity, bound_port: int
) -> str:
    if not security.needs_peer_port:
        return settings.server.address_of(bound_port)
    host, credentials = settings.server.host, security.peer_credentials()
    port = bind_port(server, host, settings.peers.peer_port, "--peer-port", credentials)
    advertised, _ = split_host_port(settings.server.address_of(port))
    return join_host_port(advertised, port)


@contextlib.asynccontextmanager
async def _stopping(server: grpc.aio.Server) -> AsyncIterator[None]:
    """Stops the server last: ended requests' messages are still on the way."""
    try:
        yield
    finally:
        await server.stop(LAST_ANSWERS_TIMEOUT_S)


@contextlib.asynccontextmanager
async def _health(bound: BoundServer, store: StateStore, service_names: Iterable[str]) -> AsyncIterator[None]:
    """The process serves even without Redis."""
    for name in ("", *service_names):
        await bound.set_serving(True, name)
    watching = asyncio.create_task(_watch_store(bound, store), name="health of the state store")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def _serving_http(
    settings: GatewaySettings, gateway: Gateway, security: ProcessSecurity, store: StateStore, exposure: str | None
) -> contextlib.AbstractAsyncContextManager[int | None]:
    return serving_http(
        settings.server.host,
        settings.server.http_port,
        lambda: Health.of(draining=gateway.draining, keeps_state=store.healthy),
        *_http_routes(settings, gateway, security),
        guard=security.http_guard,
        bounds=HttpBounds(settings.server.host_names_of(gateway.address)),
        health_notes=lambda: security.health_notes(exposure),
        tls=security.https_context(),
    )


def _http_routes(settings: GatewaySettings, gateway: Gateway, security: ProcessSecurity) -> list[AddRoutes]:
    sources = [lambda: live_metrics.samples(gateway), lambda: security_samples(security)]
    if settings.server.vllm_metrics:
        sources.append(lambda: live_metrics.vllm_samples(gateway))
    return [metrics_route("gateway", *sources), live_page(gateway, _try_box(settings, gateway))]


def _try_box(settings: GatewaySettings, gateway: Gateway) -> TryBox:
    return TryBox(gateway, settings.takes_typed_prompts, settings.server.host_names_of(gateway.address))


async def _watch_store(bound: BoundServer, store: StateStore) -> None:
    while True:
        await bound.set_serving(store.healthy, STATE_STORE_NAME)
        await asyncio.sleep(HEALTH_INTERVAL_S)


async def _drain(gateway: Gateway, bound: BoundServer, service_names: Iterable[str], timeout_ms: int) -> None:
    gateway.drain()
    for name in ("", *service_names):
        await bound.set_serving(False, name)
    _log.info("draining", num_running_requests=len(gateway.requests.running()))
    if not await gateway.requests.wait_until_idle(timeout_ms / 1000):
        _log.warning("requests are cancelled: the time to drain is over", num_requests=len(gateway.requests.running()))
