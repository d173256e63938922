"""Builds and serves a prefill worker."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc

from kvrelay import vllm_engine
from kvrelay.config.settings import BYTES_PER_MIB, PrefillSettings
from kvrelay.core.member import MemberRole
from kvrelay.core.prompt_pace import PromptPace
from kvrelay.kv_transfer.malloc_tuning import keep_message_memory
from kvrelay.kv_transfer.registered_receivers import RegisteredReceivers
from kvrelay.kv_transfer.shared_memory_transport import create_transport
from kvrelay.kv_transfer.transports import NUM_TRANSFER_THREADS, KVTransport
from kvrelay.observability.tracing import create_tracing
from kvrelay.runtime.event_loop import call_soon
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.structured_output.format_checks import FormatChecks
from kvrelay.structured_output.grammar_compiler import GrammarCompiler
from kvrelay.v1 import prefill_pb2_grpc
from kvrelay.worker.commands import MasksMade
from kvrelay.worker.engine_setup import WorkerEngine, prompt_chunk
from kvrelay.worker.engine_thread import EngineThread
from kvrelay.worker.job_traces import JobTraces
from kvrelay.worker.mask_desk import MaskDesk
from kvrelay.worker.process import WorkerKind, WorkerPlace, WorkerServices, run_worker, serve_worker
from prefill_worker.commands import Command
from prefill_worker.engine_loop import PrefillEngineLoop
from prefill_worker.kv_sender import SenderContext
from prefill_worker.scheduling.events import Report, WrittenTokens
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from prefill_worker.service import PrefillService

SERVICE_NAMES = ("kvrelay.v1.PrefillService", *vllm_engine.service_names())
BYTES_PER_KIB = 1024


def run(settings: PrefillSettings) -> None:
    run_worker(MemberRole.PREFILL, settings, serve)


async def serve(
    settings: PrefillSettings, engine: WorkerEngine, security: ProcessSecurity, stop: asyncio.Event | None = None
) -> None:
    transport = create_transport(settings.transfer, security.towards)

    def build(place: WorkerPlace) -> WorkerServices:
        return build_services(settings, engine, transport, place)

    try:
        await serve_worker(WorkerKind(MemberRole.PREFILL, SERVICE_NAMES, build), engine, settings, security, stop)
    finally:
        await transport.close()


def build_services(
    settings: PrefillSettings, engine: WorkerEngine, transport: KVTransport, place: WorkerPlace
) -> WorkerServices:
    keep_message_memory()
    loop = asyncio.get_running_loop()
    chunk = prompt_chunk(settings.engine, engine)
    limits = PrefillLimits(chunk.most, settings.engine.max_waiting_works)
    scheduler = PrefillScheduler(engine.blocks, engine.model, limits, PromptPace(chunk))
    masks = MaskDesk(engine.model, wake=lambda: thread.submit(MasksMade()))

    def publish(report: Report) -> None:
        call_soon(loop, service.report, report)

    def announce(layer: int, written: tuple[WrittenTokens, ...]) -> None:
        call_soon(loop, service.announce, layer, written)

    engine_loop = PrefillEngineLoop(scheduler, engine.step_runner, publish, announce, masks=masks)
    thread: EngineThread[Command] = EngineThread("prefill engine", engine_loop, on_start=engine.pin_thread)
    transfer_threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS, thread_name_prefix="kv export")
    context = SenderContext(
        exporter=engine.cache,
        layout=engine.model.kv_layout,
        transport=_to_registered(transport, place),
        threads=transfer_threads,
        max_message_bytes=settings.transfer.transfer_message_kib * BYTES_PER_KIB,
        max_window_bytes=settings.transfer.transfer_window_mib * BYTES_PER_MIB,
    )
    tracing = create_tracing(settings.server.otlp_endpoint, "prefill", place.hello.worker_id)
    format_checks = FormatChecks()
    grammars = GrammarCompiler(engine.grammars.compile, format_checks.check)
    service = PrefillService(
        place.hello, engine.model, context, thread, JobTraces(tracing), grammars.get, place.owners, place.prove
    )

    def add_to(server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(service, server)
        if vllm_engine.is_installed():
            from kvrelay.vllm_engine.served_engine import served_engine
            from prefill_worker.vllm_engine import add_vllm_engine

            add_vllm_engine(server, served_engine(engine, settings.engine, "kv_producer"), service, place.address)

    return WorkerServices(
        service.sessions,
        add_to,
        thread,
        transfer_threads,
        tracing,
        format_checks,
        lambda: service.metrics.samples(service.num_senders),
    )


def _to_registered(transport: KVTransport, place: WorkerPlace) -> KVTransport:
    peers = place.peers
    if peers is None:
        return transport
    return RegisteredReceivers(transport, lambda address: peers.is_registered(MemberRole.DECODE, address))
