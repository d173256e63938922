"""The prefill worker process: builds its parts and serves."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from kvrelay import event_loop, vllm_engine
from kvrelay.config import PrefillSettings
from kvrelay.engine_thread import EngineThread
from kvrelay.fault_points import enable_fault_points
from kvrelay.garbage_collection import keep_what_is_loaded
from kvrelay.kv_transfer.message_memory import keep_message_memory
from kvrelay.kv_transfer.shared_memory_transport import create_transport
from kvrelay.kv_transfer.transports import KVTransport
from kvrelay.telemetry import configure_logging
from kvrelay.tracing import create_tracing
from kvrelay.v1 import prefill_pb2_grpc, session_pb2
from kvrelay.work_traces import WorkTraces
from kvrelay.worker_engine import BYTES_PER_MIB, WorkerEngine, build_engine
from kvrelay.worker_process import WorkerKind, WorkerServices, check_redis_url, serve_worker
from kvrelay.worker_registry import MemberRole
from prefill_worker.commands import Command
from prefill_worker.engine_loop import PrefillEngineLoop
from prefill_worker.events import Report, WrittenTokens
from prefill_worker.kv_sender import SenderContext
from prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from prefill_worker.service import PrefillService

SERVICE_NAMES = ("kvrelay.v1.PrefillService", *vllm_engine.service_names())
NUM_TRANSFER_THREADS = 2
BYTES_PER_KIB = 1024


def run(settings: PrefillSettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartupError: the port is taken, a setting is wrong, or the model cannot be loaded.
    """
    configure_logging(settings.server.log_level, settings.server.log_format, role="prefill")
    enable_fault_points(settings.server.fault_points)
    check_redis_url(settings.server)
    engine = build_engine(settings.engine)
    keep_what_is_loaded()
    event_loop.run(serve(settings, engine))


async def serve(settings: PrefillSettings, engine: WorkerEngine, stop: asyncio.Event | None = None) -> None:
    """The same within a running loop, with the engine built; `stop` ends it when set."""

    transport = create_transport(settings.transfer)

    def build(hello: session_pb2.WorkerHello, address: str) -> WorkerServices:
        return build_services(settings, engine, transport, hello, address)

    try:
        kind = WorkerKind(MemberRole.PREFILL, SERVICE_NAMES, build)
        await serve_worker(kind, engine, settings.server, stop, settings.engine.step_timeout_ms)
    finally:
        await transport.close()


def build_services(
    settings: PrefillSettings, engine: WorkerEngine, transport: KVTransport, hello: session_pb2.WorkerHello, address: str
) -> WorkerServices:
    """Puts engine thread, senders and service together."""
    keep_message_memory()
    limits = PrefillLimits(settings.engine.prefill_chunk_tokens, settings.engine.max_waiting_works)
    publish = _Publisher(asyncio.get_running_loop())
    scheduler = PrefillScheduler(engine.blocks, engine.model, limits)
    loop = PrefillEngineLoop(scheduler, engine.step_runner, publish.publish, publish.announce)
    thread: EngineThread[Command] = EngineThread("prefill engine", loop, on_start=engine.pin_thread)
    transfer_threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS, thread_name_prefix="kv export")
    context = SenderContext(
        exporter=engine.cache,
        layout=engine.model.kv_layout,
        transport=transport,
        threads=transfer_threads,
        max_message_bytes=settings.transfer.transfer_message_kib * BYTES_PER_KIB,
        max_window_bytes=settings.transfer.transfer_window_mib * BYTES_PER_MIB,
    )
    tracing = create_tracing(settings.server.otlp_endpoint, "prefill", hello.worker_id)
    service = PrefillService(
        hello, engine.model, context, thread.submit, thread.submit_work, WorkTraces(tracing), engine.grammars.compile
    )
    publish.connect(service)

    def add_to(server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(service, server)
        if vllm_engine.is_installed():
            from kvrelay.vllm_engine.served_engine import served_engine
            from prefill_worker.vllm_engine import add_vllm_engine

            add_vllm_engine(server, served_engine(engine, settings.engine, "kv_producer"), service, address)

    def stop() -> None:
        transfer_threads.shutdown()
        thread.stop()
        if tracing is not None:
            tracing.close()

    return WorkerServices(
        service.sessions,
        add_to,
        thread.start,
        stop,
        lambda: thread.turn_s,
        lambda: thread.busy_s,
        lambda: service.metrics.samples(service.num_senders),
    )


class _Publisher:
    """Takes reports and announcements in the engine thread and hands them over on the loop, in one order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._service: PrefillService | None = None

    def connect(self, service: PrefillService) -> None:
        """Before the engine thread starts."""
        self._service = service

    def publish(self, report: Report) -> None:
        assert self._service is not None, "connected before the engine thread starts"
        self._call_soon(self._service.report, report)

    def announce(self, layer: int, written: tuple[WrittenTokens, ...]) -> None:
        assert self._service is not None, "connected before the engine thread starts"
        self._call_soon(self._service.announce, layer, written)

    def _call_soon(self, callback: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)
