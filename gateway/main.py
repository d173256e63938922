"""The gateway process: builds its parts, serves until it is told to stop, and lets running requests end."""

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator, Iterable

import grpc
import structlog

from gateway import live_metrics
from gateway.front_ends import add_front_ends
from gateway.live_page import live_page
from gateway.relay import Relay
from gateway.service import InferenceService
from kvrelay import event_loop
from kvrelay.config import GatewaySettings
from kvrelay.errors import ConfigError
from kvrelay.fault_points import enable_fault_points
from kvrelay.garbage_collection import collecting_when_idle, keep_what_is_loaded
from kvrelay.http_server import AddRoutes, Health, serving_http
from kvrelay.metrics.exposition import metrics_route
from kvrelay.redis_connection import RedisConnection
from kvrelay.rpc import BoundServer, bind_server, create_server
from kvrelay.signs_of_life import showing_life
from kvrelay.state_store import StateStore
from kvrelay.telemetry import configure_logging
from kvrelay.tracing import create_tracing
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.worker_registry import Member, MemberRole, WorkerRegistry

SERVICE_NAME = "kvrelay.v1.InferenceService"
STATE_STORE_NAME = "kvrelay.v1.StateStore"
"""Not a service: its health tells whether request state can be kept."""
HEALTH_INTERVAL_S = 0.2
LAST_ANSWERS_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartupError: the port is taken, or a setting is missing.
    """
    configure_logging(settings.server.log_level, settings.server.log_format, role="gateway")
    enable_fault_points(settings.server.fault_points)
    keep_what_is_loaded()
    event_loop.run(serve(settings))


async def serve(settings: GatewaySettings, stop: asyncio.Event | None = None) -> None:
    """The same within a running loop.

    Args:
        settings: of the process.
        stop: ends it when set; without one, the signals do.
    """
    redis_url = settings.server.redis_url
    if redis_url is None:
        raise ConfigError("redis_url is missing: give --redis-url, or use `kvrelay serve all`, which starts a Valkey of its own")
    gateway_id = f"gateway-{secrets.token_hex(8)}"
    stop = stop or _stop_on_signals()
    async with RedisConnection(redis_url, settings.server.redis_timeout_ms) as connection:
        store = StateStore(connection, gateway_id, settings.relay.retention_ms)
        tracing = create_tracing(settings.server.otlp_endpoint, "gateway", gateway_id, settings.relay.trace_ratio)
        relay = Relay(gateway_id, settings, store, WorkerRegistry(connection, settings.server.lease_ms), tracing)
        server = create_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(relay), server)
        service_names = (SERVICE_NAME, *add_front_ends(server, relay))
        bound = bind_server(server, settings.server.host, settings.server.port, service_names)
        relay.address = address = settings.server.address_of(bound.port)
        member = Member(gateway_id, MemberRole.GATEWAY, address)
        async with _stopping(server), relay.running(), relay.registry.lease(member), _health(bound, store, service_names):
            await server.start()
            async with (
                serving_http(
                    settings.server.host,
                    settings.server.http_port,
                    lambda: _http_health(relay, store),
                    *_http_routes(settings, relay),
                ) as http_port,
                showing_life(settings.server.watchdog_socket),
                collecting_when_idle(lambda: not relay.requests.num_running),
            ):
                _log.info("ready", address=address, http_port=http_port, gateway_id=gateway_id, redis=store.healthy)
                await stop.wait()
                await _drain(relay, bound, service_names, settings.server.drain_timeout_ms)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
    _log.info("stopped")


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def _stopping(server: grpc.aio.Server) -> AsyncIterator[None]:
    """Stops the server at the end, after the requests have ended and while their last messages are on the way."""
    try:
        yield
    finally:
        await server.stop(LAST_ANSWERS_TIMEOUT_S)


@contextlib.asynccontextmanager
async def _health(bound: BoundServer, store: StateStore, service_names: Iterable[str]) -> AsyncIterator[None]:
    """Answers health checks: serving as long as this process answers, for it can serve from the last known workers."""
    for name in ("", *service_names):
        await bound.set_serving(True, name)
    watching = asyncio.create_task(_watch_store(bound, store), name="health of the state store")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])


def _http_routes(settings: GatewaySettings, relay: Relay) -> list[AddRoutes]:
    sources = [lambda: live_metrics.samples(relay)]
    if settings.server.vllm_metrics:
        sources.append(lambda: live_metrics.vllm_samples(relay))
    return [metrics_route("gateway", *sources), live_page(relay)]


def _http_health(relay: Relay, store: StateStore) -> Health:
    if relay.draining:
        return Health.DRAINING
    return Health.SERVING if store.healthy else Health.DEGRADED


async def _watch_store(bound: BoundServer, store: StateStore) -> None:
    while True:
        await bound.set_serving(store.healthy, STATE_STORE_NAME)
        await asyncio.sleep(HEALTH_INTERVAL_S)


async def _drain(relay: Relay, bound: BoundServer, service_names: Iterable[str], timeout_ms: int) -> None:
    """Takes no new requests and lets running ones end, for so long at the most."""
    relay.draining = True
    for name in ("", *service_names):
        await bound.set_serving(False, name)
    _log.info("draining", num_running_requests=len(relay.requests.running()))
    if not await relay.requests.wait_until_idle(timeout_ms / 1000):
        _log.warning("requests are cancelled: the time to drain is over", num_requests=len(relay.requests.running()))
