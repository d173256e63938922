"""A process that poses as a worker to a gateway gets no prompt.

What the registry says, what the process says and what the operator allows have to agree.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.own_places import OwnPlaces
from kvrelay.network.rpc import create_channel, create_server
from kvrelay.security.cluster_key import NO_PROOF, ClusterKey, WorkerProof
from kvrelay.security.principal import Role
from kvrelay.security.process_security import ProcessSecurity
from kvrelay.v1 import decode_pb2_grpc, session_pb2, session_pb2_grpc
from kvrelay.v1 import inference_pb2 as pb
from tests.gateway.conftest import Bench, Gateway, eventually, read_all, token_request
from tests.gateway.conftest import bench as bench  # a fixture
from tests.support.fake_workers import MODEL, FakeDecodeWorker, FakeWorker, expected_token_ids

PROMPT = list(range(10, 50))
FOREIGN = replace(MODEL, fingerprint="e" * 32)


async def problem_of(gateway: Gateway, worker: FakeWorker) -> str:
    """Why the gateway has no session with who answers at the worker's address."""
    problems: list[str] = []

    async def is_told() -> bool:
        cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
        problems[:] = [each.problem for each in cluster.workers if each.address == worker.address and each.problem]
        return bool(problems)

    await eventually(is_told)
    return problems[0]


async def assert_nothing_goes_to(gateway: Gateway, *rogues: FakeWorker) -> None:
    for _ in range(6):
        answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
        assert answer.token_ids[0] == expected_token_ids(PROMPT, 4)
    assert [rogue.num_jobs for rogue in rogues] == [0] * len(rogues)


async def announced(bench: Bench, genuine: bool = True) -> tuple[FakeDecodeWorker, FakeDecodeWorker]:
    """A worker, and another process that has taken the address of a second one."""
    worker, rogue = await bench.workers.add_decode(), await bench.workers.add_decode()
    await bench.announce(*((worker,) if genuine else ()), rogue)
    rogue.worker_id = "decode-rogue"
    return worker, rogue


async def test_who_answers_at_a_registered_address_under_another_id_gets_nothing(bench: Bench) -> None:
    _, rogue = await announced(bench)
    gateway = await bench.gateway(num_workers=1, local_prefill_tokens=1000)
    assert "the registry does not name" in await problem_of(gateway, rogue)
    await assert_nothing_goes_to(gateway, rogue)


async def test_a_rogue_alone_gets_no_prompt(bench: Bench) -> None:
    _, rogue = await announced(bench, genuine=False)
    gateway = await bench.gateway(num_workers=0, local_prefill_tokens=1000, worker_wait_ms=200)
    assert await problem_of(gateway, rogue)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_all(gateway.stub.Generate(token_request(PROMPT, 4), timeout=5))
    assert failure.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert rogue.num_jobs == 0


async def test_a_restarted_worker_is_served_once_the_registry_names_it(bench: Bench) -> None:
    """Its port answers a moment before its lease is known."""
    _, restarted = await announced(bench, genuine=False)
    gateway = await bench.gateway(num_workers=0, local_prefill_tokens=1000)
    assert await problem_of(gateway, restarted)
    await bench.announce(restarted)
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
    assert answer.token_ids[0] == expected_token_ids(PROMPT, 4)
    assert restarted.num_jobs == 1


async def test_a_worker_with_another_model_than_it_registered_gets_nothing(bench: Bench) -> None:
    worker, rogue = await bench.workers.add_decode(), await bench.workers.add_decode()
    await bench.announce(worker, rogue)
    rogue.model = FOREIGN
    gateway = await bench.gateway(num_workers=1, local_prefill_tokens=1000)
    assert FOREIGN.fingerprint in await problem_of(gateway, rogue)
    await assert_nothing_goes_to(gateway, rogue)


@pytest.mark.parametrize("listed", [True, False])
async def test_only_listed_fingerprints_are_served_even_if_others_are_more(bench: Bench, listed: bool) -> None:
    """Of a name's versions, the one with most workers is served: a stranger could bring more."""
    worker = await bench.workers.add_decode()
    rogues = [await bench.workers.add_decode(FOREIGN) for _ in range(2)]
    await bench.announce(worker, *rogues)
    peers = PeerSettings(allowed_fingerprints=f"{'d' * 32}, {MODEL.fingerprint}" if listed else None)
    gateway = await bench.gateway(1 if listed else 3, sections={"peers": peers}, local_prefill_tokens=1000)
    if listed:
        assert "--allowed-fingerprints" in await problem_of(gateway, rogues[0])
        await assert_nothing_goes_to(gateway, *rogues)
    else:
        await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
        assert worker.num_jobs == 0


class Listening(decode_pb2_grpc.DecodeServiceServicer):
    """A rogue that keeps what gateways send to prove who they are."""

    def __init__(self) -> None:
        self.proofs: list[tuple[str, str]] = []

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        self.proofs += [(name, value) for name, value in context.invocation_metadata() if name == "authorization"]
        async for _ in request_iterator:
            pass


class Model(session_pb2_grpc.ModelServiceServicer):
    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[session_pb2.GetTokenizerResponse]:
        yield session_pb2.GetTokenizerResponse(file_name="answered")


def cluster_key(folder: Path) -> SecuritySettings:
    path = folder / "cluster.key"
    path.touch(0o600)
    path.write_text("k" * 64)
    return SecuritySettings(cluster_key_file=str(path))


async def proven(bench: Bench, settings: SecuritySettings) -> FakeDecodeWorker:
    """A worker with the cluster's key."""
    assert settings.cluster_key_file is not None
    key, worker = ClusterKey.read(settings.cluster_key_file), await bench.workers.add_decode()
    key.listens(lambda dialled: dialled == worker.address)
    worker.prove = partial(key.prove_worker, Role.DECODE)
    return worker


Forge = Callable[[bytes, str, WorkerProof | None], WorkerProof]
FORGED: dict[str, Forge] = {
    "nothing": lambda nonce, address, seen: NO_PROOF,
    "random bytes": lambda nonce, address, seen: WorkerProof(b"n" * 32, b"d" * 32),
    "the gateway's own nonce": lambda nonce, address, seen: WorkerProof(nonce, nonce),
    "what a worker answered": lambda nonce, address, seen: seen or NO_PROOF,
    "another key": lambda nonce, address, seen: other_key().prove_worker(Role.DECODE, nonce, address),
}


def other_key() -> ClusterKey:
    key = ClusterKey(b"x" * 32)
    key.listens(lambda dialled: True)
    return key


@pytest.mark.parametrize("name", FORGED)
async def test_who_has_not_the_clusters_key_gets_no_prompt_even_if_the_registry_names_it(
    bench: Bench, tmp_path: Path, name: str
) -> None:
    settings, seen = cluster_key(tmp_path), []
    worker, rogue = await proven(bench, settings), await bench.workers.add_decode()
    prove = worker.prove

    def heard(nonce: bytes, address: str) -> WorkerProof:
        seen.append(prove(nonce, address))
        return seen[-1]

    worker.prove = heard
    rogue.prove = lambda nonce, address: FORGED[name](nonce, address, seen[-1] if seen else None)
    await bench.announce(worker, rogue)
    gateway = await bench.gateway(1, sections={"security": settings}, local_prefill_tokens=1000)
    assert "does not prove that it has the cluster's key" in await problem_of(gateway, rogue)
    await assert_nothing_goes_to(gateway, rogue)
    assert seen[-1] != NO_PROOF


async def test_a_proof_of_the_same_address_is_of_one_session(bench: Bench, tmp_path: Path) -> None:
    """Who takes a worker's place may have seen all that it has ever sent."""
    settings, seen = cluster_key(tmp_path), []
    worker = await proven(bench, settings)
    prove = worker.prove

    def said_again(nonce: bytes, address: str) -> WorkerProof:
        seen.append(prove(nonce, address))
        return seen[0]

    worker.prove = said_again
    await bench.announce(worker)
    await bench.gateway(1, sections={"security": settings})
    other = await bench.gateway(0, sections={"security": settings})
    assert "does not prove" in await problem_of(other, worker)


async def test_any_workers_are_served_where_the_operator_says_so(bench: Bench, tmp_path: Path) -> None:
    worker = await bench.workers.add_decode()
    await bench.announce(worker)
    sections = {"security": cluster_key(tmp_path), "peers": PeerSettings(any_workers=True)}
    gateway = await bench.gateway(1, sections=sections, local_prefill_tokens=1000)
    await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
    assert worker.num_jobs == 1


@asynccontextmanager
async def served(
    servicer: Any, add: Any, port: int = 0, settings: SecuritySettings | None = None
) -> AsyncIterator[str]:
    """With settings, as a decode worker serves."""
    security = ProcessSecurity.of(settings or SecuritySettings(), Role.DECODE)
    server = create_server(guard=security.guard)
    add(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    security.listens(OwnPlaces("127.0.0.1", int(address.rpartition(":")[2]), address).__contains__)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def answers(address: str, credentials: Any, metadata: Any = None) -> bool:
    async with create_channel(address, credentials=credentials) as channel:
        stub = session_pb2_grpc.ModelServiceStub(channel)
        call = stub.GetTokenizer(session_pb2.GetTokenizerRequest(), metadata=metadata, timeout=30)
        try:
            pieces = [piece.file_name async for piece in call]
        except grpc.aio.AioRpcError:
            return await call.code() is not grpc.StatusCode.UNAUTHENTICATED
        return pieces == ["answered"]


async def told_by_a_gateway(bench: Bench, settings: SecuritySettings, rogue: Listening, address: str) -> Any:
    """What a gateway sends to the rogue, which a forged registry names."""
    worker = await proven(bench, settings)
    member = Member("decode-rogue", MemberRole.DECODE, address, MODEL.name, MODEL.fingerprint)
    await bench.announce(worker)
    async with bench._registry.lease(member):
        await bench.gateway(num_workers=1, sections={"security": settings})

        async def is_told() -> bool:
            return bool(rogue.proofs)

        await eventually(is_told)
    return tuple(rogue.proofs[-1:])


async def test_what_a_gateway_tells_a_rogue_opens_no_worker(bench: Bench, tmp_path: Path) -> None:
    settings, rogue = cluster_key(tmp_path), Listening()
    gateway = ProcessSecurity.of(settings, Role.GATEWAY)
    async with (
        served(rogue, decode_pb2_grpc.add_DecodeServiceServicer_to_server) as rogue_address,
        served(Model(), session_pb2_grpc.add_ModelServiceServicer_to_server, settings=settings) as address,
    ):
        stolen = await told_by_a_gateway(bench, settings, rogue, rogue_address)
        assert not await answers(address, None, stolen)
        assert await answers(address, gateway.towards(Role.DECODE))


async def test_what_a_rogue_was_told_opens_no_later_worker_at_its_address(bench: Bench, tmp_path: Path) -> None:
    settings, rogue = cluster_key(tmp_path), Listening()
    gateway = ProcessSecurity.of(settings, Role.GATEWAY)
    async with served(rogue, decode_pb2_grpc.add_DecodeServiceServicer_to_server) as address:
        stolen = await told_by_a_gateway(bench, settings, rogue, address)
    port = int(address.rpartition(":")[2])
    async with served(Model(), session_pb2_grpc.add_ModelServiceServicer_to_server, port, settings) as same:
        assert same == address
        assert not await answers(address, None, stolen)
        assert await answers(address, gateway.towards(Role.DECODE))
