"""The contract under other settings, for every kind of attention: whole prompts as one chunk, short
ones computed locally.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvrelay.client import AsyncClient, WorkerRole
from kvrelay.config.decoding_settings import DecodingSettings
from tests.integration.clusters import (
    assert_at_rest,
    cluster_of,
    engine,
    greedy,
    random_prompt,
    token_ids,
    values_under_test,
    workers,
)
from tests.support.reference import NearTies, Reference
from tests.support.tiny_models import MAX_CONTEXT_TOKENS, make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

KINDS = (
    "gemma3_text",  # a KV head for each group, and a sliding window
    *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("gpt2", "gpt_bigcode", "llama", "qwen3", "mixtral")),
)
BLOCK_SIZE = 16
NUM_TOKENS = 24
LOCAL_PREFILL_TOKENS = 64


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(kind, folder) for kind in values_under_test(request, "kind")}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {kind: Reference(path) for kind, path in models.items()}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def wide(models: dict[str, Path]) -> AsyncIterator[AsyncClient]:
    engines = [engine(path, block_size=BLOCK_SIZE, prefill_chunk_tokens=MAX_CONTEXT_TOKENS) for path in models.values()]
    cluster = cluster_of(engines, engines, local_prefill_tokens=LOCAL_PREFILL_TOKENS)
    async with cluster, AsyncClient(cluster.gateway_address) as client:
        yield client
        await assert_at_rest(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_short_prompts_are_computed_on_the_decode_worker_and_long_ones_are_not(
    kind: str, wide: AsyncClient, references: dict[str, Reference]
) -> None:
    ties = NearTies()
    for length in (1, LOCAL_PREFILL_TOKENS - 1, LOCAL_PREFILL_TOKENS, 150, 400):
        local = length < LOCAL_PREFILL_TOKENS
        completion = await greedy(wide, random_prompt(length, length), NUM_TOKENS, model=kind)
        references[kind].check(random_prompt(length, length), token_ids(completion), ties)
        assert completion.finished.phases.prefilled_on_decode_worker is local
        assert (completion.finished.phases.transfer_bytes == 0) is local
    # 150 tokens, of which 144 are cached by now: what is left is short.
    again = await greedy(wide, random_prompt(150, 150), NUM_TOKENS, model=kind)
    references[kind].check(random_prompt(150, 150), token_ids(again), ties)
    assert again.finished.usage.num_cached_tokens == 144
    assert again.finished.phases.prefilled_on_decode_worker
    four = await greedy(wide, random_prompt(40, 40), NUM_TOKENS, model=kind, n=4)
    for sequence in range(4):
        references[kind].check(random_prompt(40, 40), token_ids(four, sequence), ties)
    assert four.finished.phases.prefilled_on_decode_worker
    print(f"{kind}: {ties}")


@pytest.mark.parametrize("kind", KINDS)
async def test_whole_prompts_in_one_chunk_together_give_the_reference_tokens(
    kind: str, wide: AsyncClient, references: dict[str, Reference]
) -> None:
    ties = NearTies()
    prompts = [random_prompt(7000 + length, length) for length in (30, 64, 90, 128, 129, 200, 300, 400)]
    runs = (greedy(wide, prompt, NUM_TOKENS, model=kind) for prompt in prompts)
    for prompt, completion in zip(prompts, await asyncio.gather(*runs), strict=True):
        references[kind].check(prompt, token_ids(completion), ties)
    print(f"{kind}: {ties}")


@pytest.mark.parametrize("kind", ["gemma3_text"])
async def test_without_a_prefill_worker_the_decode_worker_computes_every_prompt(
    kind: str, models: dict[str, Path], references: dict[str, Reference]
) -> None:
    """And with speculation the tokens are the same. This model repeats itself, so that some guesses
    are right.
    """
    decode_engine = engine(models[kind], block_size=BLOCK_SIZE)
    cluster = cluster_of([], [decode_engine], decoding=DecodingSettings(speculative_tokens=8, speculative_max_rows=64))
    async with cluster, AsyncClient(cluster.gateway_address) as client:
        prompts = [random_prompt(200, 200), random_prompt(21, 7) * 8, random_prompt(5, 2) * 3]
        completions = await asyncio.gather(*(greedy(client, prompt, 4 * NUM_TOKENS) for prompt in prompts))
        for prompt, completion in zip(prompts, completions, strict=True):
            references[kind].check(prompt, token_ids(completion), NearTies())
            assert completion.finished.phases.prefilled_on_decode_worker
        [decode_worker] = workers(await client.cluster(), WorkerRole.DECODE)
        assert 0 < decode_worker.load.num_accepted_tokens < decode_worker.load.num_drafted_tokens
        await assert_at_rest(client)
