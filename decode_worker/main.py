"""Builds and serves a decode worker."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc

from decode_worker.commands import Command
from decode_worker.engine_loop import DecodeEngineLoop
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling.events import StepReport
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from decode_worker.scheduling.speculation import SpeculationLimits
from decode_worker.service import DecodeService
from kvrelay import vllm_engine
from kvrelay.config.settings import DecodeSettings
from kvrelay.core.member import MemberRole
from kvrelay.core.prompt_pace import ChunkRange, PromptPace
from kvrelay.kv_transfer.malloc_tuning import keep_message_memory
from kvrelay.kv_transfer.shm_fd_passing import RegionServer
from kvrelay.kv_transfer.transports import NUM_TRANSFER_THREADS
from kvrelay.observability.tracing import create_tracing
from kvrelay.runtime.event_loop import call_soon
from kvrelay.runtime.fault_points import fault_point
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.structured_output.format_checks import FormatChecks
from kvrelay.structured_output.grammar_compiler import GrammarCompiler
from kvrelay.v1 import decode_pb2_grpc
from kvrelay.worker.commands import MasksMade
from kvrelay.worker.engine_setup import WorkerEngine, prompt_chunk
from kvrelay.worker.engine_thread import EngineThread
from kvrelay.worker.job_traces import JobTraces
from kvrelay.worker.mask_desk import MaskDesk
from kvrelay.worker.process import WorkerKind, WorkerPlace, WorkerServices, run_worker, serve_worker

SERVICE_NAMES = ("kvrelay.v1.DecodeService", "kvrelay.v1.KVTransferService", *vllm_engine.service_names())
SHARED_CHUNK_TOKENS_ON_CPU = 16
"""A core computes about ten rows while it reads the weights once. More rows delay all sequences."""
SHARED_STEP_S = 0.025
"""About what a step with that chunk takes on two cores with AVX2."""


def run(settings: DecodeSettings) -> None:
    run_worker(MemberRole.DECODE, settings, serve)


async def serve(
    settings: DecodeSettings, engine: WorkerEngine, security: ProcessSecurity, stop: asyncio.Event | None = None
) -> None:
    shared_memory = RegionServer()

    def build(place: WorkerPlace) -> WorkerServices:
        return build_services(settings, engine, shared_memory, place)

    shared_memory.start()
    try:
        await serve_worker(WorkerKind(MemberRole.DECODE, SERVICE_NAMES, build), engine, settings, security, stop)
    finally:
        shared_memory.close()


def build_services(
    settings: DecodeSettings, engine: WorkerEngine, shared_memory: RegionServer, place: WorkerPlace
) -> WorkerServices:
    keep_message_memory()
    loop = asyncio.get_running_loop()
    grants = WriteGrants()
    chunk = prompt_chunk(settings.engine, engine)
    pace = PromptPace(chunk, shared_chunk(settings, engine, chunk))
    limits = _limits(settings, chunk)
    scheduler = DecodeScheduler(engine.blocks, limits, grants, _speculation(settings, engine), pace)
    masks = MaskDesk(engine.model, wake=lambda: thread.submit(MasksMade()))

    def publish(report: StepReport) -> None:
        call_soon(loop, service.report, report)

    thread: EngineThread[Command] = EngineThread(
        "decode engine",
        DecodeEngineLoop(scheduler, engine.step_runner, grants, publish, masks=masks),
        on_start=engine.pin_thread,
        before_turn=lambda: fault_point("decode.turn_begins"),
    )
    transfer_threads = ThreadPoolExecutor(NUM_TRANSFER_THREADS, thread_name_prefix="kv import")
    tracing = create_tracing(settings.server.otlp_endpoint, "decode", place.hello.worker_id)
    traces = JobTraces(tracing)
    receiver = KVReceiver(
        ReceiverContext(engine.cache, engine.model, grants, transfer_threads, thread.submit, shared_memory, traces)
    )
    format_checks = FormatChecks()
    grammars = GrammarCompiler(engine.grammars.compile, format_checks.check)
    service = DecodeService(
        place.hello, engine.model, place.address, thread, traces, grammars.get, place.owners, place.prove
    )

    def add_to(server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(service, server)
        receiver.add_to(server)
        if vllm_engine.is_installed():
            from decode_worker.vllm_engine.service import add_vllm_engine
            from kvrelay.vllm_engine.served_engine import served_engine

            engine_values = served_engine(engine, settings.engine, "kv_consumer")
            add_vllm_engine(server, engine_values, service, place.towards, place.peers)

    return WorkerServices(
        service.sessions, add_to, thread, transfer_threads, tracing, format_checks, service.metrics.samples
    )


def _limits(settings: DecodeSettings, chunk: ChunkRange) -> DecodeLimits:
    return DecodeLimits(
        prefill_chunk_tokens=chunk.most,
        max_running_sequences=settings.engine.max_running_sequences,
        max_waiting_works=settings.engine.max_waiting_works,
    )


def shared_chunk(settings: DecodeSettings, engine: WorkerEngine, chunk: ChunkRange) -> ChunkRange:
    num_tokens = settings.decoding.local_prefill_chunk_tokens
    if num_tokens is not None:
        return ChunkRange.fixed(num_tokens)
    if engine.cache.device.type != "cpu":
        return chunk
    if not engine.adapts_chunks:
        return ChunkRange.fixed(SHARED_CHUNK_TOKENS_ON_CPU)
    return ChunkRange(SHARED_CHUNK_TOKENS_ON_CPU, SHARED_CHUNK_TOKENS_ON_CPU, chunk.most, SHARED_STEP_S)


def _speculation(settings: DecodeSettings, engine: WorkerEngine) -> SpeculationLimits | None:
    if settings.decoding.speculative_tokens == 0:
        return None
    return SpeculationLimits(
        max_draft_tokens=settings.decoding.speculative_tokens,
        max_rows=settings.decoding.speculative_max_rows,
        max_sequence_tokens=engine.max_sequence_tokens,
    )
