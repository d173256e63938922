"""What a tenant learns of others' prompts from `usage.num_cached_tokens`: nothing."""

import random
from collections import Counter
from typing import Any

import grpc
import pytest

from kvrelay.errors import AccessDeniedError
from kvrelay.vllm_engine.messages import engine_pb
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import read_all, token_request
from tests.support.guarded_cluster import BLOCK_SIZE, GuardedCluster, Keys, as_caller, guarded_cluster

BANK, MALLORY = "bank", "mallory"
NUM_GUESSES = 1000
BEFORE, AFTER = list(range(10, 10 + 4 * BLOCK_SIZE)), list(range(100, 100 + 2 * BLOCK_SIZE))
"""What everybody knows of the prompt, around the secret."""


def prompt_with(secret: int) -> list[int]:
    return [*BEFORE, 10 + secret // 32, 10 + secret % 32, *AFTER]


async def ask(cluster: GuardedCluster, caller: str, secret: int, **fields: Any) -> int:
    """Returns what the answer says of the cache."""
    call = cluster.gateways[0].stub.Generate(
        token_request(prompt_with(secret), 1, **fields), metadata=as_caller(caller)
    )
    answer = await read_all(call)
    assert answer.finished is not None
    return answer.finished.usage.num_cached_tokens


async def ask_as_smg(cluster: GuardedCluster, caller: str, secret: int) -> int:
    """The same over VllmEngine, whose messages name no tenant."""
    request = engine_pb.GenerateRequest(
        request_id="a",
        tokenized=engine_pb.TokenizedInput(input_ids=prompt_with(secret)),
        sampling_params=engine_pb.SamplingParams(max_tokens=1),
    )
    messages = [each async for each in cluster.engine().Generate(request, metadata=as_caller(caller))]
    return int(messages[-1].complete.cached_tokens)


@pytest.mark.parametrize("probe", [ask, ask_as_smg], ids=["Generate", "VllmEngine"])
async def test_a_thousand_probes_tell_nothing_of_another_tenants_prompt(
    monkeypatch: pytest.MonkeyPatch, probe: Any
) -> None:
    async with guarded_cluster(monkeypatch, Keys([BANK, MALLORY]), num_gateways=1) as cluster:
        secret = random.randrange(NUM_GUESSES)
        await probe(cluster, BANK, secret)
        guesses = random.sample(range(NUM_GUESSES), NUM_GUESSES)
        assert await probe(cluster, MALLORY, guesses[0]) == 0
        told = {guess: await probe(cluster, MALLORY, guess) for guess in guesses[1:]}
        # Its own earlier guesses began alike; the right one shows no more than any other.
        assert Counter(told.values()) == {len(BEFORE): NUM_GUESSES - 1}


async def test_within_a_tenant_the_same_probes_find_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_cluster(monkeypatch, Keys([BANK]), num_gateways=1) as cluster:
        await ask(cluster, BANK, 777)
        told = {guess: await ask(cluster, BANK, guess) for guess in range(760, 790)}
        assert [guess for guess, num_cached in told.items() if num_cached > len(BEFORE)] == [777]


async def test_nobody_probes_under_another_tenants_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded_cluster(monkeypatch, Keys([BANK, MALLORY]), num_gateways=1) as cluster:
        await ask(cluster, BANK, 777)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await ask(cluster, MALLORY, 777, tenant=BANK)
        assert isinstance(error_of_rpc(failure.value), AccessDeniedError)
        assert await ask(cluster, MALLORY, 777, tenant=MALLORY) == 0


async def test_workers_see_one_salt_for_a_tenant_from_all_gateways_and_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tenants = [BANK, MALLORY]
    async with guarded_cluster(monkeypatch, Keys(tenants)) as cluster:
        for tenant in tenants:
            for number, gateway in enumerate(cluster.gateways):
                call = gateway.stub.Generate(token_request(prompt_with(number), 1), metadata=as_caller(tenant))
                await read_all(call)
        assert len(cluster.decode.salts) == len(tenants)
        assert not [salt for salt in cluster.decode.salts if any(tenant in salt for tenant in tenants)]
