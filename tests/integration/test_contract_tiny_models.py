"""The contract: prefill worker, wire and decode worker together give transformers' greedy tokens,
for every kind of attention.

Real processes; one worker pair for each model behind one gateway, so that routing by model name is
tested as well. A prompt's chunk is one block, and the decode workers' pools are so small that
sequences together must wait and be preempted.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoConfig

from kvrelay.client import AsyncClient, Completion, WorkerRole
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
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

KINDS = (
    "gpt2",  # a KV head for each query head
    "gpt_bigcode",  # one KV head for all
    "llama",  # one for each group
    "gemma3_text",  # and a sliding window
    *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("qwen3", "mixtral")),
)
PROMPT_LENGTHS = (1, 2, 15, 16, 17, 50, 130, 400)
NUM_TOKENS = 24
BLOCK_SIZE = 16
NUM_DECODE_BLOCKS = 30


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(kind, folder) for kind in values_under_test(request, "kind")}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(models: dict[str, Path]) -> AsyncIterator[AsyncClient]:
    prefill = [engine(path, block_size=BLOCK_SIZE, prefill_chunk_tokens=BLOCK_SIZE) for path in models.values()]
    decode = [engine(path, block_size=BLOCK_SIZE, num_kv_blocks=NUM_DECODE_BLOCKS) for path in models.values()]
    async with (
        cluster_of(prefill, decode, local_prefill_tokens=0) as cluster,
        AsyncClient(cluster.gateway_address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, Reference]:
    return {kind: Reference(path) for kind, path in models.items()}


@pytest.fixture
def ties(request: pytest.FixtureRequest) -> Iterator[NearTies]:
    ties = NearTies()
    yield ties
    print(f"{request.node.name}: {ties}")


def kv_bytes_per_token(path: Path) -> int:
    """2 × layers × kv_heads × head_dim × element size of float32, from the model's own
    configuration.
    """
    config: Any = AutoConfig.from_pretrained(path)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or (
        1 if getattr(config, "multi_query", False) else None
    )
    num_kv_heads = num_kv_heads or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * num_kv_heads * head_dim * 4)


def assert_crossed_the_wire(completion: Completion, path: Path) -> None:
    usage, phases = completion.finished.usage, completion.finished.phases
    num_transferred = usage.num_prompt_tokens - usage.num_cached_tokens
    assert not phases.prefilled_on_decode_worker
    assert num_transferred > 0
    assert phases.transfer_bytes == kv_bytes_per_token(path) * num_transferred


async def transferred_bytes(client: AsyncClient, role: WorkerRole, model: str) -> int:
    return sum(worker.load.kv_transfer_bytes for worker in workers(await client.cluster(), role, model))


@pytest.mark.parametrize("kind", KINDS)
async def test_alone_each_prompt_gives_the_reference_tokens(
    kind: str, client: AsyncClient, models: dict[str, Path], references: dict[str, Reference], ties: NearTies
) -> None:
    before = [await transferred_bytes(client, role, kind) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)]
    num_bytes = 0
    for length in PROMPT_LENGTHS:
        prompt = random_prompt(length, length)
        completion = await greedy(client, prompt, NUM_TOKENS, model=kind, tenant="alone")
        references[kind].check(prompt, token_ids(completion), ties)
        assert completion.finished.usage.num_cached_tokens == 0
        assert_crossed_the_wire(completion, models[kind])
        num_bytes += completion.finished.phases.transfer_bytes
    await assert_at_rest(client)
    assert num_bytes == sum(PROMPT_LENGTHS) * kv_bytes_per_token(models[kind])
    after = [await transferred_bytes(client, role, kind) for role in (WorkerRole.PREFILL, WorkerRole.DECODE)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [num_bytes, num_bytes]


@pytest.mark.parametrize("kind", KINDS)
async def test_together_each_prompt_gives_the_reference_tokens(
    kind: str, client: AsyncClient, models: dict[str, Path], references: dict[str, Reference], ties: NearTies
) -> None:
    prompts = [random_prompt(length, length) for length in PROMPT_LENGTHS]
    runs = (greedy(client, prompt, NUM_TOKENS, model=kind, tenant="together") for prompt in prompts)
    for prompt, completion in zip(prompts, await asyncio.gather(*runs), strict=True):
        references[kind].check(prompt, token_ids(completion), ties)
        assert_crossed_the_wire(completion, models[kind])
    await assert_at_rest(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_prefix_hits_give_the_same_tokens_and_send_only_the_rest(
    kind: str, client: AsyncClient, models: dict[str, Path], references: dict[str, Reference], ties: NearTies
) -> None:
    shared = random_prompt(1000, 6 * BLOCK_SIZE)
    for number, tail_length in enumerate((5, 40)):
        prompt = shared + random_prompt(2000 + number, tail_length)
        completion = await greedy(client, prompt, NUM_TOKENS, model=kind, tenant="prefix")
        references[kind].check(prompt, token_ids(completion), ties)
        assert completion.finished.usage.num_cached_tokens == (0 if number == 0 else len(shared))
        assert_crossed_the_wire(completion, models[kind])
    other_tenant = await greedy(client, prompt, NUM_TOKENS, model=kind, tenant="somebody else")
    assert other_tenant.finished.usage.num_cached_tokens == 0
    await assert_at_rest(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_four_sequences_share_one_prompt_and_each_gives_the_reference_tokens(
    kind: str, client: AsyncClient, models: dict[str, Path], references: dict[str, Reference], ties: NearTies
) -> None:
    prompt = random_prompt(3000, 37)
    completion = await greedy(client, prompt, NUM_TOKENS, model=kind, tenant="four", n=4)
    assert len(completion.outputs) == 4
    for sequence in range(4):
        references[kind].check(prompt, token_ids(completion, sequence), ties)
    assert_crossed_the_wire(completion, models[kind])
    await assert_at_rest(client)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pool_too_small_preempts_and_gives_the_reference_tokens(
    kind: str, client: AsyncClient, references: dict[str, Reference], ties: NearTies
) -> None:
    """Eight sequences of 40 + 100 tokens need 72 blocks; the pool has 30."""
    prompts = [random_prompt(500 + number, 40) for number in range(8)]
    runs = (greedy(client, prompt, 100, model=kind) for prompt in prompts)
    for prompt, completion in zip(prompts, await asyncio.gather(*runs), strict=True):
        references[kind].check(prompt, token_ids(completion), ties)
        assert completion.finished.phases.transfer_bytes > 0
    # The sequences of one request preempt each other, too, and are all there at once: four of 40 +
    # 120 tokens need 34 blocks, the prompt's shared.
    four = await greedy(client, prompts[0], 120, model=kind, n=4, tenant="four")
    for sequence in range(4):
        references[kind].check(prompts[0], token_ids(four, sequence), ties)
    await assert_at_rest(client)
    (decode_worker,) = workers(await client.cluster(), WorkerRole.DECODE, kind)
    assert decode_worker.load.num_preemptions > 0


@pytest.mark.parametrize("kind", ["llama"])
async def test_sequences_of_one_sampled_request_differ(kind: str, client: AsyncClient) -> None:
    completion = await client.complete(
        token_ids=random_prompt(4000, 37),
        model=kind,
        n=4,
        seed=7,
        temperature=1.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    assert len({tuple(token_ids(completion, sequence)) for sequence in range(4)}) == 4
    await assert_at_rest(client)
