"""The contract on a real model, in float32, through real processes: the greedy tokens of
transformers, alone and eight at once.

And seeded sampling: the same tokens alone, in a batch of eight, and after the decode worker was
killed in mid-stream.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from transformers import AutoConfig

from kvrelay.client import AsyncClient
from kvrelay.testing import FaultCluster
from tests.integration.clusters import CALM, assert_at_rest, greedy, token_ids
from tests.support.reference import NearTies, Reference

pytestmark = [
    pytest.mark.integration,
    pytest.mark.real_model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]

PROMPT_LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 64, 100, 127, 128, 200, 333, 512, 777, 1024, 1500)
FEWER_LENGTHS = (1, 2, 15, 16, 17, 33, 64, 127, 128, 520)
"""About the borders of blocks, and one that is computed in three chunks."""
NUM_TOKENS = 64
FEWER_TOKENS = 20
"""More than a block: each decode enters a new one."""
SIZES = [
    pytest.param(FEWER_LENGTHS, FEWER_TOKENS, id="fewer"),
    pytest.param(PROMPT_LENGTHS, NUM_TOKENS, id="all", marks=pytest.mark.soak),
]
TEXT = Path(__file__).parents[2] / "LICENSE"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 32, "ignore_eos": True}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(smollm2_path: Path) -> AsyncIterator[FaultCluster]:
    engine = {"num_kv_blocks": 1024, "block_size": 16, "prefill_chunk_tokens": 256}
    requests = {"local_prefill_tokens": 0, "worker_wait_ms": 120000}
    async with FaultCluster(model=smollm2_path, engine=engine, requests=requests, server=CALM, restart=True) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(cluster: FaultCluster) -> AsyncIterator[AsyncClient]:
    async with cluster.client() as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def text(client: AsyncClient) -> list[int]:
    """Token ids of natural text."""
    return list(await client.tokenize(TEXT.read_text("utf-8")))


def prompts_of(text: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of the text, each from another place."""
    prompts = [text[30 * number :][:length] for number, length in enumerate(lengths)]
    assert [len(prompt) for prompt in prompts] == list(lengths)
    return prompts


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Reference:
    return Reference(smollm2_path)


@pytest.fixture(scope="module")
def bytes_per_token(smollm2_path: Path) -> int:
    config: Any = AutoConfig.from_pretrained(smollm2_path)
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4)


@pytest.mark.parametrize(("lengths", "num_tokens"), SIZES)
async def test_alone_each_prompt_gives_the_reference_tokens(
    client: AsyncClient,
    text: list[int],
    reference: Reference,
    bytes_per_token: int,
    lengths: Sequence[int],
    num_tokens: int,
) -> None:
    ties = NearTies()
    # The reference computes on the core that is free: one worker is idle while the other computes.
    async with asyncio.TaskGroup() as group:
        for prompt in prompts_of(text, lengths):
            completion = await greedy(client, prompt, num_tokens, tenant=f"alone {len(prompt)}")
            assert completion.finished.phases.transfer_bytes == bytes_per_token * len(prompt)
            group.create_task(asyncio.to_thread(reference.check, prompt, token_ids(completion), ties))
    print(ties)
    await assert_at_rest(client)


@pytest.mark.parametrize(("lengths", "num_tokens"), SIZES)
async def test_eight_at_once_each_prompt_gives_the_reference_tokens(
    client: AsyncClient,
    text: list[int],
    reference: Reference,
    bytes_per_token: int,
    lengths: Sequence[int],
    num_tokens: int,
) -> None:
    ties = NearTies()
    places = asyncio.Semaphore(8)

    async def run(prompt: list[int]) -> None:
        async with places:
            completion = await greedy(client, prompt, num_tokens, tenant=f"eight {len(prompt)}")
        assert completion.finished.phases.transfer_bytes == bytes_per_token * len(prompt)
        await asyncio.to_thread(reference.check, prompt, token_ids(completion), ties)

    async with asyncio.TaskGroup() as group:
        for prompt in prompts_of(text, lengths):
            group.create_task(run(prompt))
    print(ties)
    await assert_at_rest(client)


async def test_seeded_sampling_is_the_same_alone_in_a_batch_and_after_the_decode_workers_death(
    cluster: FaultCluster, client: AsyncClient, text: list[int]
) -> None:
    prompt, *others = prompts_of(text, (100, 7, 33, 64, 65, 128, 200, 333))
    alone = token_ids(await client.complete(token_ids=prompt, seed=11, tenant="alone", timeout_s=120, **SAMPLED))

    seeded = [(11, prompt), *enumerate(others)]
    runs = (
        client.complete(token_ids=each, seed=seed, tenant="batch", timeout_s=120, **SAMPLED) for seed, each in seeded
    )
    batch = await asyncio.gather(*runs)
    assert token_ids(batch[0]) == alone
    assert token_ids(batch[1]) != alone

    worker = cluster["decode-0"]
    with worker.arm("decode.step_begins", at=12) as fault:
        stream = client.generate(token_ids=prompt, seed=11, tenant="killed", timeout_s=180, **SAMPLED)
        deltas = [delta async for delta in stream]
        assert fault.num_fired == 1
    assert [delta.index + place for delta in deltas for place in range(len(delta.tokens))] == list(range(len(alone)))
    assert [token.token_id for delta in deltas for token in delta.tokens] == alone
    assert stream.finished is not None
    assert stream.finished.phases.num_attempts > 1
    assert worker.num_restarts == 1
    await assert_at_rest(client)
