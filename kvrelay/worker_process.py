"""The life of a worker process: listen, be found, serve, drain, end. Knows nothing of what kind of worker it is.

bind -> build services -> start -> lease -> ready ... SIGTERM -> draining -> works end -> lease withdrawn -> exit 0
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
import structlog

from kvrelay.config import ServerSettings
from kvrelay.errors import ConfigError
from kvrelay.garbage_collection import collecting_when_idle
from kvrelay.http_server import AddRoutes, Health, serving_http
from kvrelay.liveness import PROTOCOL_VERSION
from kvrelay.metrics.exposition import metrics_route
from kvrelay.metrics.families import Sample
from kvrelay.metrics.worker_metrics import WorkerMetrics
from kvrelay.model_service import TokenizerService
from kvrelay.redis_connection import RedisConnection
from kvrelay.rpc import BoundServer, bind_server, create_server
from kvrelay.signs_of_life import showing_life
from kvrelay.v1 import session_pb2, session_pb2_grpc
from kvrelay.wire import model_to_pb
from kvrelay.worker_engine import WorkerEngine
from kvrelay.worker_registry import Member, MemberRole, WorkerRegistry
from kvrelay.worker_sessions import WorkerSessions

MODEL_SERVICE = "kvrelay.v1.ModelService"
LAST_MESSAGES_TIMEOUT_S = 1.0
DEFAULT_STEP_TIMEOUT_MS = 60_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerServices:
    """What one kind of worker adds to a process."""

    sessions: WorkerSessions
    add_to: Callable[[grpc.aio.Server], None]
    """Adds its servicers to the server."""
    start: Callable[[], None]
    """Starts its engine thread."""
    stop: Callable[[], None]
    """Stops its engine thread, and waits for that."""
    turn_s: Callable[[], float]
    """For how long the engine thread's current turn has been going on, in seconds."""
    busy_s: Callable[[], float]
    """For how long the engine thread has had something to do, in seconds."""
    samples: Callable[[], Iterable[Sample]]
    """What only its kind of worker counts."""


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """What tells one kind of worker from the other."""

    role: MemberRole
    service_names: tuple[str, ...]
    build_services: Callable[[session_pb2.WorkerHello, str], WorkerServices]
    """From who the worker is and the host:port under which others reach it; called on the loop."""


async def serve_worker(
    kind: WorkerKind,
    engine: WorkerEngine,
    settings: ServerSettings,
    stop: asyncio.Event | None = None,
    step_timeout_ms: int = DEFAULT_STEP_TIMEOUT_MS,
) -> None:
    """Serves until told to stop, then drains.

    Args:
        kind: of worker.
        engine: the loaded model.
        settings: of the process.
        stop: ends it when set; without one, SIGTERM and SIGINT do, and a second signal exits at once.
        step_timeout_ms: the process ends at once when its engine is longer at one step.

    Raises:
        StartupError: the port is taken, or a setting is missing.
    """
    check_redis_url(settings)
    assert settings.redis_url is not None
    stop = stop or _stop_on_signals()
    worker_id = f"{kind.role.value}-{secrets.token_hex(8)}"
    server = create_server(takes_bulk=True)
    bound = bind_server(server, settings.host, settings.port, (*kind.service_names, MODEL_SERVICE))
    address = settings.address_of(bound.port)
    services = kind.build_services(_hello(worker_id, engine), address)
    services.add_to(server)
    session_pb2_grpc.add_ModelServiceServicer_to_server(TokenizerService(engine.folder, engine.model.fingerprint), server)
    member = Member(worker_id, kind.role, address, engine.model.name, engine.model.fingerprint)
    async with RedisConnection(settings.redis_url, settings.redis_timeout_ms) as connection:
        services.start()
        watching = asyncio.create_task(watch_engine(services.turn_s, step_timeout_ms / 1000), name="watch of the engine")
        try:
            await server.start()
            registry = WorkerRegistry(connection, settings.lease_ms)
            async with (
                serving_http(
                    settings.host,
                    settings.http_port,
                    lambda: _http_health(services, connection),
                    _metrics(kind, engine, services, settings),
                ) as http_port,
                registry.lease(member),
                showing_life(settings.watchdog_socket),
                collecting_when_idle(lambda: services.sessions.is_idle),
            ):
                if not connection.health.healthy:
                    _log.warning("Redis does not answer; gateways find this worker once it does. Check --redis-url.")
                await _set_serving(bound, kind, True)
                _log.info("ready", address=address, http_port=http_port, worker_id=worker_id, model=engine.model.name)
                await stop.wait()
                await _set_serving(bound, kind, False)
                await services.sessions.drain(settings.drain_timeout_ms)
        finally:
            await server.stop(LAST_MESSAGES_TIMEOUT_S)
            await asyncio.to_thread(services.stop)
            watching.cancel()
    _log.info("stopped", worker_id=worker_id)


def _exit_process() -> None:
    os._exit(1)


async def watch_engine(turn_s: Callable[[], float], timeout_s: float, on_hung: Callable[[], None] = _exit_process) -> None:
    """Ends the process when its engine hangs, as a death that gateways notice at once: the event loop would go on answering
    heartbeats for it, and its works would never end.

    Args:
        turn_s: for how long the engine's current turn has been going on, in seconds.
        timeout_s: how long one may take.
        on_hung: what to do then.
    """
    while (elapsed_s := turn_s()) < timeout_s:  # noqa: ASYNC110 - a thread that hangs sets no event
        await asyncio.sleep(timeout_s / 10)
    _log.critical("the engine hangs; the process ends", step_s=round(elapsed_s, 1))
    on_hung()


def check_redis_url(settings: ServerSettings) -> None:
    """Raises ConfigError when there is none; before a model is loaded in vain."""
    if settings.redis_url is None:
        raise ConfigError("redis_url is missing: give --redis-url, or use `kvrelay serve all`, which starts a Valkey of its own")


def _hello(worker_id: str, engine: WorkerEngine) -> session_pb2.WorkerHello:
    return session_pb2.WorkerHello(
        worker_id=worker_id,
        protocol_version=PROTOCOL_VERSION,
        model=model_to_pb(engine.model),
        block_size=engine.blocks.block_size,
        max_sequence_tokens=engine.max_sequence_tokens,
    )


def _metrics(kind: WorkerKind, engine: WorkerEngine, services: WorkerServices, settings: ServerSettings) -> AddRoutes:
    block_size = engine.blocks.block_size
    metrics = WorkerMetrics(engine.model.name, block_size, services.sessions, services.busy_s, services.samples)
    sources = [metrics.samples, metrics.vllm_samples] if settings.vllm_metrics else [metrics.samples]
    return metrics_route(kind.role.value, *sources)


def _http_health(services: WorkerServices, connection: RedisConnection) -> Health:
    if services.sessions.draining:
        return Health.DRAINING
    return Health.SERVING if connection.health.healthy else Health.DEGRADED


async def _set_serving(bound: BoundServer, kind: WorkerKind, serving: bool) -> None:
    for name in ("", *kind.service_names, MODEL_SERVICE):
        await bound.set_serving(serving, name)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop
