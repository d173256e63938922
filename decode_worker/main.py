"""The decode worker process: builds its parts and serves."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from decode_worker.commands import Command
from decode_worker.engine_loop import DecodeEngineLoop
from decode_worker.events import StepReport
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.push_permits import PushPermits
from decode_worker.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.service import DecodeService
from decode_worker.speculation import SpeculationLimits
from kvrelay import event_loop, vllm_engine
from kvrelay.config import DecodeSettings
from kvrelay.engine_thread import EngineThread
from kvrelay.fault_points import enable_fault_points
from kvrelay.garbage_collection import keep_what_is_loaded
from kvrelay.kv_transfer.memory_handover import HandoverServer
from kvrelay.kv_transfer.message_memory import keep_message_memory
from kvrelay.telemetry import configure_logging
from kvrelay.tracing import create_tracing
from kvrelay.v1 import decode_pb2_grpc, session_pb2
from kvrelay.work_traces import WorkTraces
from kvrelay.worker_engine import WorkerEngine, build_engine
from kvrelay.worker_process import WorkerKind, WorkerServices, check_redis_url, serve_worker
from kvrelay.worker_registry import MemberRole

SERVICE_NAMES = ("kvrelay.v1.DecodeService", "kvrelay.v1.KVTransferService", *vllm_engine.service_names())
NUM_TRANSFER_THREADS = 2
LOCAL_PREFILL_CHUNK_TOKENS_ON_CPU = 16
"""A core reads the weights once for about ten rows in the time that it computes them: more rows lengthen everybody's step."""


def run(settings: DecodeSettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartupError: the port is taken, a setting is wrong, or the model cannot be loaded.
    """
    configure_logging(settings.server.log_level, settings.server.log_format, role="decode")
    enable_fault_points(settings.server.fault_points)
    check_redis_url(settings.server)
    engine = build_engine(settings.engine)
    keep_what_is_loaded()
    event_loop.run(serve(settings, engine))


async def serve(settings: DecodeSettings, engine: WorkerEngine, stop: asyncio.Event | None = None) -> None:
    """The same within a running loop, with the engine built; `stop` ends it when set."""

    def build(hello: session_pb2.WorkerHello, address: str) -> WorkerServices:
        return build_services(settings, engine, hello, address)

    kind = WorkerKind(MemberRole.DECODE, SERVICE_NAMES, build)
    await serve_worker(kind, engine, settings.server, stop, settings.engine.step_timeout_ms)


def build_services(
    settings: DecodeSettings, engine: WorkerEngine, hello: session_pb2.WorkerHello, address: str
) -> WorkerServices:
    """Puts engine thread, receiver and service together."""
    keep_message_memory()
    permits = PushPermits()
    publish = _Publisher(asyncio.get_running_loop())
    scheduler = DecodeScheduler(engine.blocks, _limits(settings, engine), permits, _speculation(settings, engine))
    thread: EngineThread[Command] = EngineThread(
        "decode engine", DecodeEngineLoop(scheduler, engine.step_runner, permits, publish), on_start=engine.pin_thread
    )
    transfer_threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS, thread_name_prefix="kv import")
    event_loop = asyncio.get_running_loop()
    shared_memory = HandoverServer()
    tracing = create_tracing(settings.server.otlp_endpoint, "decode", hello.worker_id)
    traces = WorkTraces(tracing)
    receiver = KVReceiver(
        ReceiverContext(engine.cache, engine.model, permits, transfer_threads, thread.submit, shared_memory, traces)
    )
    service = DecodeService(hello, engine.model, address, thread.submit, thread.submit_work, traces, engine.grammars.compile)
    publish.report = service.report

    def add_to(server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(service, server)
        receiver.add_to(server)
        if vllm_engine.is_installed():
            from decode_worker.vllm_engine import add_vllm_engine
            from kvrelay.vllm_engine.served_engine import served_engine

            add_vllm_engine(server, served_engine(engine, settings.engine, "kv_consumer"), service)

    def start() -> None:
        shared_memory.start()
        thread.start()

    def stop() -> None:
        event_loop.call_soon_threadsafe(shared_memory.close)
        transfer_threads.shutdown()
        thread.stop()
        if tracing is not None:
            tracing.close()

    return WorkerServices(
        service.sessions, add_to, start, stop, lambda: thread.turn_s, lambda: thread.busy_s, service.metrics.samples
    )


def _limits(settings: DecodeSettings, engine: WorkerEngine) -> DecodeLimits:
    shared_chunk_tokens = settings.decoding.local_prefill_chunk_tokens
    if shared_chunk_tokens is None and engine.cache.device.type == "cpu":
        shared_chunk_tokens = LOCAL_PREFILL_CHUNK_TOKENS_ON_CPU
    return DecodeLimits(
        prefill_chunk_tokens=settings.engine.prefill_chunk_tokens,
        max_running_sequences=settings.engine.max_running_sequences,
        max_waiting_works=settings.engine.max_waiting_works,
        shared_prefill_chunk_tokens=shared_chunk_tokens,
    )


def _speculation(settings: DecodeSettings, engine: WorkerEngine) -> SpeculationLimits | None:
    if settings.decoding.speculative_tokens == 0:
        return None
    return SpeculationLimits(
        max_draft_tokens=settings.decoding.speculative_tokens,
        max_rows=settings.decoding.speculative_max_rows,
        max_sequence_tokens=engine.max_sequence_tokens,
    )


class _Publisher:
    """Takes reports in the engine thread and hands them over on the loop, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.report: Callable[[StepReport], None] = lambda report: None
        """Set once the service is there, before the engine thread starts."""

    def __call__(self, report: StepReport) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.report, report)
