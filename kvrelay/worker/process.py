"""The life of a worker process.

bind -> build services -> start -> lease -> ready ... SIGTERM -> draining -> jobs end -> lease
withdrawn -> exit 0
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog

from kvrelay.config.settings import DecodeSettings, PrefillSettings
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.exposure import exposure_of, reminding, showing_health
from kvrelay.network.http_bounds import HttpBounds
from kvrelay.network.http_server import Health, serving_http
from kvrelay.network.own_places import OwnPlaces
from kvrelay.network.rpc import BoundServer, bind_server, create_server
from kvrelay.observability.metrics.exposition import metrics_route
from kvrelay.observability.metrics.families import Sample
from kvrelay.observability.metrics.security_metrics import security_samples
from kvrelay.observability.tracing import Tracing
from kvrelay.process import exit_process, set_up_process, stop_on_signals
from kvrelay.runtime import event_loop
from kvrelay.runtime.garbage_collection import collecting_when_idle, keep_what_is_loaded
from kvrelay.runtime.own_time import TurnClock
from kvrelay.runtime.watchdog import send_keepalives
from kvrelay.security.cluster_key import ProveWorker, prove_nothing
from kvrelay.security.credentials import Towards, in_plain_text
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection, check_redis_at
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.state.request_owners import RequestOwners
from kvrelay.structured_output.format_checks import FormatChecks
from kvrelay.v1 import session_pb2, session_pb2_grpc
from kvrelay.wire.convert import model_to_pb
from kvrelay.worker.engine_setup import WorkerEngine, build_engine
from kvrelay.worker.engine_thread import EngineThread
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.metrics import WorkerMetrics
from kvrelay.worker.ownership import OwnerLookup
from kvrelay.worker.tokenizer_service import TokenizerService

MODEL_SERVICE = "kvrelay.v1.ModelService"
LAST_MESSAGES_TIMEOUT_S = 1.0

WorkerSettings = PrefillSettings | DecodeSettings
SettingsT = TypeVar("SettingsT", PrefillSettings, DecodeSettings)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    hello: session_pb2.WorkerHello
    address: str
    """host:port for other processes."""
    owners: OwnerLookup | None = None
    towards: Towards = in_plain_text
    peers: RegisteredPeers | None = None
    """None, as in tests without Redis: every address counts."""
    prove: ProveWorker = prove_nothing


@dataclass(frozen=True, slots=True)
class WorkerServices:
    sessions: GatewaySessions
    add_to: Callable[[grpc.aio.Server], None]
    thread: EngineThread[Any]
    transfer_threads: ThreadPoolExecutor
    tracing: Tracing | None
    format_checks: FormatChecks
    samples: Callable[[], Iterable[Sample]]

    def stop(self) -> None:
        self.transfer_threads.shutdown()
        self.thread.stop()
        if self.tracing is not None:
            self.tracing.close()


@dataclass(frozen=True, slots=True)
class WorkerKind:
    role: MemberRole
    service_names: tuple[str, ...]
    build_services: Callable[[WorkerPlace], WorkerServices]
    """Called on the loop."""


def run_worker(
    role: MemberRole,
    settings: SettingsT,
    serve: Callable[[SettingsT, WorkerEngine, ProcessSecurity], Coroutine[Any, Any, None]],
) -> None:
    """Builds the engine and serves until SIGTERM or SIGINT."""
    set_up_process(settings.server, role.value)
    # Before the slow load of the model.
    asyncio.run(check_redis_at(settings.server.required_redis_url()))
    security = ProcessSecurity.of(settings.security, Role(role.value))
    exposure_of_worker(security, settings)
    engine = build_engine(settings.engine)
    keep_what_is_loaded()
    event_loop.run(serve(settings, engine, security))


def exposure_of_worker(security: ProcessSecurity, settings: WorkerSettings) -> str | None:
    return exposure_of(settings.server.host, security.danger, insecure=settings.security.insecure)


async def serve_worker(
    kind: WorkerKind,
    engine: WorkerEngine,
    settings: WorkerSettings,
    security: ProcessSecurity,
    stop: asyncio.Event | None = None,
) -> None:
    """Serves until `stop` is set (by default SIGTERM and SIGINT), then drains."""
    server_settings = settings.server
    stop = stop or stop_on_signals()
    exposure = exposure_of_worker(security, settings)
    worker_id = f"{kind.role.value}-{secrets.token_hex(8)}"
    async with RedisConnection(server_settings.required_redis_url(), server_settings.redis_timeout_ms) as connection:
        server = create_server(takes_bulk=True, guard=security.guard)
        names = (*kind.service_names, MODEL_SERVICE)
        credentials = security.server_credentials()
        bound = bind_server(server, server_settings.host, server_settings.port, names, credentials)
        address = server_settings.address_of(bound.port)
        security.listens(OwnPlaces(server_settings.host, bound.port, address).__contains__)
        registry = MemberRegistry(connection, server_settings.lease_ms)
        hello, owners, peers = _hello(worker_id, engine), RequestOwners(connection), RegisteredPeers(registry)
        place = WorkerPlace(hello, address, owners, security.towards, peers, security.prove_worker)
        services = kind.build_services(place)
        services.add_to(server)
        tokenizer_service = TokenizerService(engine.folder, engine.model.fingerprint)
        session_pb2_grpc.add_ModelServiceServicer_to_server(tokenizer_service, server)
        member = Member(worker_id, kind.role, address, engine.model.name, engine.model.fingerprint)
        services.thread.start()
        watching = watch_engine(lambda: services.thread.turn_s, settings.engine.step_timeout_ms / 1000)
        watch = asyncio.create_task(watching, name="watch of the engine")
        try:
            await server.start()
            async with (
                security.watching(),
                reminding(exposure, server_settings.host),
                showing_health(bound, exposure, lambda: security.problems),
                _serving_http(kind, engine, services, security, settings, address, connection) as http_port,
                registry.lease(member),
                send_keepalives(server_settings.watchdog_socket),
                collecting_when_idle(lambda: services.sessions.is_idle),
            ):
                if not connection.health.healthy:
                    _log.warning(
                        "Redis cannot be used; gateways find this worker once it can. Check --redis-url.",
                        cause=connection.health.problem,
                    )
                await _set_serving(bound, kind, True)
                model = {"model": engine.model.name, "fingerprint": engine.model.fingerprint}
                _log.info("ready", address=address, http_port=http_port, worker_id=worker_id, **model)
                await stop.wait()
                await _set_serving(bound, kind, False)
                await services.sessions.drain(server_settings.drain_timeout_ms)
        finally:
            await server.stop(LAST_MESSAGES_TIMEOUT_S)
            await services.format_checks.close()
            await asyncio.to_thread(services.stop)
            watch.cancel()
    _log.info("stopped", worker_id=worker_id)


async def watch_engine(
    turn_s: Callable[[], float], timeout_s: float, on_hung: Callable[[], None] = exit_process
) -> None:
    """Ends the process when the engine hangs. Otherwise it would still answer heartbeats."""
    clock = TurnClock(interval_s := timeout_s / 10)  # a thread that hangs sets no event
    while (elapsed_s := clock.look(turn_s(), time.monotonic())) < timeout_s:  # noqa: ASYNC110
        await asyncio.sleep(interval_s)
    _log.critical("the engine hangs; the process ends", step_s=round(elapsed_s, 1))
    on_hung()


def _hello(worker_id: str, engine: WorkerEngine) -> session_pb2.WorkerHello:
    return session_pb2.WorkerHello(
        worker_id=worker_id,
        protocol_version=PROTOCOL_VERSION,
        model=model_to_pb(engine.model),
        block_size=engine.blocks.block_size,
        max_sequence_tokens=engine.max_sequence_tokens,
        engine=engine.description,
    )


def _serving_http(
    kind: WorkerKind,
    engine: WorkerEngine,
    services: WorkerServices,
    security: ProcessSecurity,
    settings: WorkerSettings,
    address: str,
    connection: RedisConnection,
) -> AbstractAsyncContextManager[int | None]:
    block_size, thread = engine.blocks.block_size, services.thread
    metrics = WorkerMetrics(engine.model.name, block_size, services.sessions, lambda: thread.busy_s, services.samples)
    sources = [metrics.samples, lambda: security_samples(security)]
    server, exposure = settings.server, exposure_of_worker(security, settings)
    if server.vllm_metrics:
        sources.append(metrics.vllm_samples)
    return serving_http(
        server.host,
        server.http_port,
        lambda: Health.of(draining=services.sessions.draining, keeps_state=connection.health.healthy),
        metrics_route(kind.role.value, *sources),
        guard=security.http_guard,
        bounds=HttpBounds(server.host_names_of(address)),
        health_notes=lambda: security.health_notes(exposure),
        tls=security.https_context(),
    )


async def _set_serving(bound: BoundServer, kind: WorkerKind, serving: bool) -> None:
    for name in ("", *kind.service_names, MODEL_SERVICE):
        await bound.set_serving(serving, name)
