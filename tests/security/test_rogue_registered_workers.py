"""A process that poses as a worker to a gateway gets no prompt.

What the registry says, what the process says and what the operator allows have to agree.
"""

from dataclasses import replace

import grpc
import pytest

from kvrelay.config.security_settings import PeerSettings
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
