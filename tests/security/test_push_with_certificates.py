"""KV between workers with certificates: only a prefill worker may push, and it pushes only to
registered decode workers that prove that they are one.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

from kvrelay.config.settings import TransferSettings
from kvrelay.core.job import Job
from kvrelay.core.member import Member, MemberRole
from kvrelay.core.quoting import shortened
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.transports import GrpcTransport, PushPlan
from kvrelay.network.rpc import bind_server, create_channel, create_server
from kvrelay.security import certificates
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, kv_transfer_pb2, kv_transfer_pb2_grpc, prefill_pb2_grpc, session_pb2
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, start_prefill_to_pb
from kvrelay.worker.engine_setup import WorkerEngine
from tests.security.test_tls import PLAN, TIMEOUT_S, security_of
from tests.support import redis_fixtures
from tests.support.jobs import make_job
from tests.support.scripted_gateway import ScriptedSession, session_with
from tests.support.worker_fixtures import RunningWorker, running_decode_worker, running_prefill_worker, tiny_engine

server, connection = redis_fixtures.server, redis_fixtures.connection

PROMPT = list(range(5, 45))
NUM_TOKENS = 6


@pytest.fixture
def engine() -> WorkerEngine:
    """A new one for each test: what another test left in its cache would not be pushed."""
    return tiny_engine(num_kv_blocks=256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make_certificates(tmp_path / "certificates", PLAN)
    return tmp_path / "certificates"


class Pair:
    """Both workers over TLS, and a gateway's session with each."""

    def __init__(self, decode_worker: RunningWorker, registry: MemberRegistry) -> None:
        self.decode_worker = decode_worker
        self.registry = registry
        self.decode: ScriptedSession
        self.prefill: ScriptedSession

    async def reserve(self, job: Job) -> decode_pb2.Reserved:
        await self.decode.send(reserve=reserve_to_pb(job, self.decode.hello.model.fingerprint))
        reserved: decode_pb2.Reserved = await self.decode.expect("reserved")
        return reserved

    async def start_prefill(self, job: Job, ticket: bytes, address: str) -> None:
        await self.prefill.send(start_prefill=start_prefill_to_pb(job, ticket, address, 0))


@asynccontextmanager
async def running_pair(
    folder: Path,
    engine: WorkerEngine,
    connection: RedisConnection,
    transport: Literal["grpc", "shared-memory"] = "grpc",
) -> AsyncIterator[Pair]:
    registry = MemberRegistry(connection)
    gateway = security_of(folder, "gateway")
    settings = TransferSettings(transfer_message_kib=16, transfer_transport=transport)
    prefill_engine = tiny_engine(num_kv_blocks=256)
    async with AsyncExitStack() as stack:
        decode_worker = await stack.enter_async_context(
            running_decode_worker(engine, security=security_of(folder, "decode"))
        )
        prefill_worker = await stack.enter_async_context(
            running_prefill_worker(
                prefill_engine, settings, peers=RegisteredPeers(registry), security=security_of(folder, "prefill")
            )
        )
        pair = Pair(decode_worker, registry)
        pair.decode = await stack.enter_async_context(
            session_with("decode", decode_worker.address, credentials=gateway.towards(Role.DECODE))
        )
        pair.prefill = await stack.enter_async_context(
            session_with("prefill", prefill_worker.address, credentials=gateway.towards(Role.PREFILL))
        )
        yield pair
        await prefill_worker.wait_until_idle()


@pytest.mark.parametrize("transport", ["grpc", "shared-memory"])
async def test_kv_goes_from_a_prefill_worker_to_a_registered_decode_worker(
    folder: Path, engine: WorkerEngine, connection: RedisConnection, transport: Literal["grpc", "shared-memory"]
) -> None:
    job = make_job(PROMPT, NUM_TOKENS)
    async with running_pair(folder, engine, connection, transport) as pair:
        address = pair.decode_worker.address
        async with pair.registry.lease(Member("decode-1", MemberRole.DECODE, address)):
            reserved = await pair.reserve(job)
            await pair.start_prefill(job, reserved.ticket, address)
            done = await pair.prefill.expect("prefill_done")
            assert (await pair.prefill.expect("transfer_done")).transport == transport
            started = await pair.decode.expect("decode_started")
            assert started.num_transferred_tokens == len(PROMPT)
            first = [done.tokens[0].token.token_id]
            assert len(await pair.decode.collect_tokens(job.job_id, 0, first)) == NUM_TOKENS
        await pair.decode_worker.wait_until_idle()


async def push_as(caller: ProcessSecurity, address: str, plan: PushPlan) -> None:
    """Begins a push, and reads what is answered."""
    transport = GrpcTransport(int(TIMEOUT_S * 1000), towards=caller.towards)
    try:
        push = await transport.open(address, plan)
        async for _ in push.replies():
            pass
    finally:
        await transport.close()


@pytest.mark.parametrize("role", ["gateway", "decode", "front"])
async def test_no_other_role_pushes_even_with_a_valid_ticket(
    folder: Path, engine: WorkerEngine, connection: RedisConnection, role: str
) -> None:
    job = make_job(PROMPT, NUM_TOKENS)
    async with running_pair(folder, engine, connection) as pair:
        reserved = await pair.reserve(job)
        plan = PushPlan(job.job_id, reserved.ticket, engine.model.fingerprint, 0, len(PROMPT))
        with pytest.raises(TransferError, match="takes a caller with one of the roles prefill"):
            await push_as(security_of(folder, role), pair.decode_worker.address, plan)
        # The reservation is as it was: the prefill worker's push finds it.
        async with pair.registry.lease(Member("decode-1", MemberRole.DECODE, pair.decode_worker.address)):
            await pair.start_prefill(job, reserved.ticket, pair.decode_worker.address)
            await pair.prefill.expect("transfer_done")
            await pair.decode.expect("decode_started")
        await pair.decode.cancel_job(job.job_id)
        await pair.decode_worker.wait_until_idle()


def sessions_of(channel: grpc.aio.Channel, role: Role) -> Any:
    if role is Role.DECODE:
        return decode_pb2_grpc.DecodeServiceStub(channel).Session()
    return prefill_pb2_grpc.PrefillServiceStub(channel).Session()


@pytest.mark.parametrize(
    ("caller", "process"),
    [("prefill", Role.DECODE), ("decode", Role.DECODE), ("front", Role.DECODE), ("prefill", Role.PREFILL)],
)
async def test_only_gateways_open_sessions(folder: Path, engine: WorkerEngine, caller: str, process: Role) -> None:
    running: Any = running_decode_worker if process is Role.DECODE else running_prefill_worker
    async with running(engine, security=security_of(folder, process.value)) as worker:
        towards = security_of(folder, caller).towards(process)
        async with create_channel(worker.address, credentials=towards) as channel:
            call = sessions_of(channel, process)
            with pytest.raises(grpc.aio.AioRpcError, match="takes a caller with one of the roles"):
                await call.read()
            assert await call.code() is grpc.StatusCode.PERMISSION_DENIED


class Poser(kv_transfer_pb2_grpc.KVTransferServiceServicer):
    """Listens at a registered address, and would take all that comes."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def Push(self, request_iterator: Any, context: Any) -> AsyncIterator[kv_transfer_pb2.PushResponse]:
        self.num_calls += 1
        async for _ in request_iterator:
            yield kv_transfer_pb2.PushResponse()

    async def OfferSharedMemory(self, request: Any, context: Any) -> Any:
        self.num_calls += 1
        return kv_transfer_pb2.OfferSharedMemoryResponse()


def credentials_of_poser(folder: Path, tmp_path: Path, who: str) -> grpc.ServerCredentials | None:
    if who == "plain text":
        return None
    if who == "another CA's decode worker":
        folder = tmp_path / "other"
        certificates.make_certificates(folder, PLAN)
        who = "decode"
    pair = ((folder / f"{who}.key").read_bytes(), (folder / f"{who}.pem").read_bytes())
    return grpc.ssl_server_credentials([pair])


@pytest.mark.parametrize("transport", ["grpc", "shared-memory"])
@pytest.mark.parametrize("who", ["prefill", "gateway", "front", "another CA's decode worker", "plain text"])
async def test_a_registered_address_gets_nothing_without_a_decode_workers_certificate(
    folder: Path,
    tmp_path: Path,
    engine: WorkerEngine,
    connection: RedisConnection,
    who: str,
    transport: Literal["grpc", "shared-memory"],
) -> None:
    poser, grpc_server = Poser(), create_server()
    kv_transfer_pb2_grpc.add_KVTransferServiceServicer_to_server(poser, grpc_server)
    bound = bind_server(grpc_server, "127.0.0.1", 0, (), credentials_of_poser(folder, tmp_path, who))
    await grpc_server.start()
    address, job = f"127.0.0.1:{bound.port}", make_job(PROMPT, NUM_TOKENS)
    try:
        async with (
            running_pair(folder, engine, connection, transport) as pair,
            pair.registry.lease(Member("decode-rogue", MemberRole.DECODE, address)),
        ):
            await pair.start_prefill(job, bytes(16), address)
            failed = await pair.prefill.expect("job_failed")
            assert failed.kind == session_pb2.FAILURE_KIND_TRANSFER, shortened(failed.message)
            assert failed.job_id == job_id_to_pb(job.job_id)
            assert address in failed.message
        assert poser.num_calls == 0
    finally:
        await grpc_server.stop(None)


async def test_a_decode_worker_that_is_not_registered_is_not_dialled(
    folder: Path, engine: WorkerEngine, connection: RedisConnection
) -> None:
    """Its certificate alone does not make it a place for KV."""
    num_connections = 0

    def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        writer.close()

    job = make_job(PROMPT, NUM_TOKENS)
    listener = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    address = "{}:{}".format(*listener.sockets[0].getsockname())
    async with (
        listener,
        running_pair(folder, engine, connection) as pair,
        pair.registry.lease(Member("prefill-2", MemberRole.PREFILL, address)),
    ):
        for each in (address, pair.decode_worker.address):
            await pair.start_prefill(job, bytes(16), each)
            assert "no decode worker is registered" in (await pair.prefill.expect("job_failed")).message
            job = make_job(PROMPT, NUM_TOKENS, request_id="b" * 32)
    assert num_connections == 0
