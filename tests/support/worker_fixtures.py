"""Workers in the test's process: real model, real gRPC on loopback, no Redis."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode_worker.main
import prefill_worker.main
from kvrelay.config.settings import DecodeSettings, EngineSettings, PrefillSettings, TransferSettings
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.kv_transfer.shared_memory_transport import create_transport
from kvrelay.kv_transfer.shm_fd_passing import RegionServer
from kvrelay.network.rpc import bind_server, create_server
from kvrelay.security.credentials import in_plain_text
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.v1 import session_pb2
from kvrelay.wire.convert import model_to_pb
from kvrelay.worker.engine_setup import WorkerEngine, build_engine
from kvrelay.worker.ownership import OwnerLookup
from kvrelay.worker.process import WorkerPlace, WorkerServices
from tests.support.tiny_models import make_tiny_model

TINY_FOLDER = Path(tempfile.gettempdir()) / f"kvrelay-tiny-models-{os.getuid()}"
NUM_BLOCKS = 64
BLOCK_SIZE = 4
IDLE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RunningWorker:
    """A worker that serves at `address`."""

    address: str
    engine: WorkerEngine
    services: WorkerServices

    async def wait_until_idle(self) -> None:
        """Waits until no job is left and all blocks are free or cached; checks the pool (I3)."""
        blocks, leases = self.engine.blocks, self.services.sessions.leases
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                while len(leases) or blocks.num_used_blocks:  # noqa: ASYNC110 - in another thread
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"{len(leases)} jobs and {blocks.num_used_blocks} used blocks are left") from None
        blocks.check_integrity()


def tiny_engine(kind: str = "llama", **settings: Any) -> WorkerEngine:
    """An engine with a tiny model."""
    folder = make_tiny_model(kind, TINY_FOLDER)
    values = {
        "num_kv_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "num_threads": 1,
        "prefill_chunk_tokens": 16,
        **settings,
    }
    return build_engine(EngineSettings(model=str(folder), **values))


@asynccontextmanager
async def running_decode_worker(
    engine: WorkerEngine,
    *,
    owners: OwnerLookup | None = None,
    security: ProcessSecurity | None = None,
    **settings: Any,
) -> AsyncIterator[RunningWorker]:
    """Serves until left; with `security`, over TLS."""
    values = {"prefill_chunk_tokens": 16, **settings}

    worker_settings = DecodeSettings(engine=EngineSettings(**values))
    shared_memory = RegionServer()

    def build(hello: session_pb2.WorkerHello, address: str) -> WorkerServices:
        place = WorkerPlace(hello, address, owners)
        return decode_worker.main.build_services(worker_settings, engine, shared_memory, place)

    shared_memory.start()
    try:
        async with _running(engine, build, security) as worker:
            yield worker
    finally:
        shared_memory.close()


@asynccontextmanager
async def running_prefill_worker(
    engine: WorkerEngine,
    transfer: TransferSettings | None = None,
    *,
    owners: OwnerLookup | None = None,
    peers: RegisteredPeers | None = None,
    security: ProcessSecurity | None = None,
    **settings: Any,
) -> AsyncIterator[RunningWorker]:
    """Serves until left; with `security`, over TLS."""
    values = {"prefill_chunk_tokens": 16, **settings}
    worker_settings = PrefillSettings(
        engine=EngineSettings(**values), transfer=transfer or TransferSettings(transfer_message_kib=16)
    )
    transport = create_transport(
        worker_settings.transfer, towards=in_plain_text if security is None else security.towards
    )

    def build(hello: session_pb2.WorkerHello, address: str) -> WorkerServices:
        place = WorkerPlace(hello, address, owners, peers=peers)
        return prefill_worker.main.build_services(worker_settings, engine, transport, place)

    try:
        async with _running(engine, build, security) as worker:
            yield worker
    finally:
        await transport.close()


@asynccontextmanager
async def _running(engine: WorkerEngine, build: Any, security: ProcessSecurity | None) -> AsyncIterator[RunningWorker]:
    server = create_server(guard=None if security is None else security.guard)
    bound = bind_server(server, "127.0.0.1", 0, (), None if security is None else security.server_credentials())
    address = f"127.0.0.1:{bound.port}"
    hello = session_pb2.WorkerHello(
        worker_id="w",
        protocol_version=PROTOCOL_VERSION,
        model=model_to_pb(engine.model),
        block_size=engine.blocks.block_size,
        max_sequence_tokens=engine.max_sequence_tokens,
    )
    services = build(hello, address)
    services.add_to(server)
    services.thread.start()
    await server.start()
    try:
        worker = RunningWorker(address, engine, services)
        yield worker
        # engines are shared: leftovers of a test show here
        await worker.wait_until_idle()
    finally:
        await server.stop(None)
        await asyncio.to_thread(services.stop)
