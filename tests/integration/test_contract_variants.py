"""The contract under other settings of one small model: chunk sizes, local prefill, and a pool too small for what is asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient, WorkerRole
from tests.integration.clusters import assert_at_rest, cluster_of, engine, greedy, random_prompt, token_ids, workers
from tests.reference import NearTies, Reference
from tests.tiny_models import MAX_CONTEXT_TOKENS, make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

BLOCK_SIZE = 16
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@asynccontextmanager
async def started(
    model: Path, *, local_prefill_tokens: int = 0, decode: dict[str, object] | None = None, **settings: object
) -> AsyncIterator[AsyncClient]:
    """One prefill and one decode worker; `settings` go to both engines, `decode` to the second one only."""
    prefill_engine = engine(model, block_size=BLOCK_SIZE, **settings)
    decode_engine = engine(model, block_size=BLOCK_SIZE, **settings, **(decode or {}))
    cluster = cluster_of([prefill_engine], [decode_engine], local_prefill_tokens=local_prefill_tokens)
    async with cluster, AsyncClient(cluster.gateway_address) as client:
        yield client
        await assert_at_rest(client)


@pytest.mark.parametrize("chunk_tokens", [BLOCK_SIZE, MAX_CONTEXT_TOKENS])
async def test_chunks_of_one_block_and_of_the_whole_prompt(model: Path, reference: Reference, chunk_tokens: int) -> None:
    ties = NearTies()
    async with started(model, prefill_chunk_tokens=chunk_tokens) as client:
        prompts = [random_prompt(length, length) for length in (1, 16, 33, 200, 400)]
        for prompt in prompts:
            completion = await greedy(client, prompt, NUM_TOKENS)
            reference.check(prompt, token_ids(completion), ties)
            assert completion.finished.phases.transfer_bytes > 0
        runs = (greedy(client, prompt, NUM_TOKENS, tenant="together") for prompt in prompts)
        for prompt, completion in zip(prompts, await asyncio.gather(*runs), strict=True):
            reference.check(prompt, token_ids(completion), ties)
    print(ties)


async def test_short_prompts_are_computed_on_the_decode_worker_and_long_ones_are_not(model: Path, reference: Reference) -> None:
    ties = NearTies()
    async with started(model, local_prefill_tokens=64) as client:
        for length, local in ((1, True), (63, True), (64, False), (150, False)):
            prompt = random_prompt(length, length)
            completion = await greedy(client, prompt, NUM_TOKENS)
            reference.check(prompt, token_ids(completion), ties)
            phases = completion.finished.phases
            assert phases.prefilled_on_decode_worker is local
            assert (phases.transfer_bytes == 0) is local
        # 150 tokens, of which 144 are cached by now: what is left is short.
        again = await greedy(client, random_prompt(150, 150), NUM_TOKENS)
        reference.check(random_prompt(150, 150), token_ids(again), ties)
        assert again.finished.usage.num_cached_tokens == 144
        assert again.finished.phases.prefilled_on_decode_worker
        four = await greedy(client, random_prompt(40, 40), NUM_TOKENS, n=4)
        for sequence in range(4):
            reference.check(random_prompt(40, 40), token_ids(four, sequence), ties)
    print(ties)


async def test_without_a_prefill_worker_the_decode_worker_computes_every_prompt(model: Path, reference: Reference) -> None:
    decode_engine = engine(model, block_size=BLOCK_SIZE)
    async with cluster_of([], [decode_engine]) as cluster, AsyncClient(cluster.gateway_address) as client:
        prompt = random_prompt(200, 200)
        completion = await greedy(client, prompt, NUM_TOKENS)
        reference.check(prompt, token_ids(completion), NearTies())
        assert completion.finished.phases.prefilled_on_decode_worker
        await assert_at_rest(client)


async def test_a_pool_too_small_preempts_and_gives_the_same_tokens(model: Path, reference: Reference) -> None:
    ties = NearTies()
    num_tokens = 100
    # Eight sequences of 40 + 100 tokens need 72 blocks; the pool has 30.
    async with started(model, decode={"num_kv_blocks": 30}) as client:
        prompts = [random_prompt(500 + number, 40) for number in range(8)]
        runs = (greedy(client, prompt, num_tokens) for prompt in prompts)
        for prompt, completion in zip(prompts, await asyncio.gather(*runs), strict=True):
            reference.check(prompt, token_ids(completion), ties)
            assert completion.finished.phases.transfer_bytes > 0
        (decode_worker,) = workers(await client.cluster(), WorkerRole.DECODE)
        assert decode_worker.load.num_preemptions > 0
        # n = 4 in the same pool: the sequences of one request preempt each other.
        four = await greedy(client, prompts[0], 120, n=4, tenant="four")
        for sequence in range(4):
            reference.check(prompts[0], token_ids(four, sequence), ties)
    print(ties)
