"""Requests go where their beginning is cached, by what real workers tell of their caches."""

import asyncio
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient, Cluster, WorkerRole
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from tests.integration.clusters import CALM, assert_at_rest, greedy, random_prompt, token_ids, wait_until
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

BLOCK_SIZE, NUM_BLOCKS = 16, 32
PROMPT = random_prompt(1, 100)
NUM_TOKENS = 20


async def until_all_caches_are_known(client: AsyncClient) -> Cluster:
    """Returns the view of a cluster at rest, whose workers' published blocks are all cached ones."""
    await assert_at_rest(client)
    seen: list[Cluster] = []

    async def known() -> bool:
        cluster = await client.cluster()
        seen.append(cluster)
        num_cached = sum(worker.load.num_cached_blocks for worker in cluster.workers if worker.connected)
        return cluster.num_index_entries == num_cached > 0

    await wait_until(known, "the gateway knows as many blocks as are cached")
    return seen[-1]


def tokens_in_decode_caches(cluster: Cluster) -> tuple[int, int]:
    """Expected and found."""
    (hits,) = [hits for hits in cluster.cache_hits if hits.role is WorkerRole.DECODE]
    return hits.num_expected_tokens, hits.num_found_tokens


async def test_a_conversation_stays_with_its_cache_as_long_as_that_is_there(tmp_path: Path) -> None:
    cluster = FaultCluster(
        num_prefill=1,
        num_decode=2,
        model=make_tiny_model("llama", tmp_path),
        engine={"num_kv_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE},
        requests={"local_prefill_tokens": 0, "worker_wait_ms": 60_000},
        server=CALM,
    )
    async with cluster, cluster.client() as client:
        # The worker that load prefers is busy while the conversation begins, and idle later.
        fault = cluster.arm_one_of("decode", "decode.step_begins", FaultAction.WAIT, at=5, wait_ms=50_000)
        other = asyncio.create_task(greedy(client, random_prompt(2, 20), 30))
        await fault.wait_until_fired()
        first = await greedy(client, PROMPT, NUM_TOKENS)
        fault.disarm()
        preferred = (await other).finished.phases.decode_worker_id
        assert first.finished.phases.decode_worker_id != preferred
        before = await until_all_caches_are_known(client)

        longer = [*PROMPT, *token_ids(first), *random_prompt(3, 20)]
        second = await greedy(client, longer, NUM_TOKENS)
        num_computed = len(PROMPT) + NUM_TOKENS - 1  # the last token is only sampled
        num_cached = num_computed // BLOCK_SIZE * BLOCK_SIZE
        assert second.finished.phases.decode_worker_id == first.finished.phases.decode_worker_id
        assert second.finished.usage.num_cached_tokens == num_cached
        after = await until_all_caches_are_known(client)
        assert tokens_in_decode_caches(before) == (0, 0)
        assert tokens_in_decode_caches(after) == (num_cached, num_cached)

        # A dead worker's cache is forgotten: the numbers are equal again, without its own.
        (dead,) = [worker for worker in after.workers if worker.worker_id == preferred]
        await cluster[cluster.name_of_worker(dead)].kill()
        await wait_until(lambda: is_gone(client, preferred), "the worker is gone")
        alone = await until_all_caches_are_known(client)
        assert alone.num_index_entries == after.num_index_entries - dead.load.num_cached_blocks

        # Other prompts take the conversation's blocks, and it is no longer expected there.
        for seed in (4, 5):
            await greedy(client, random_prompt(seed, 400), NUM_TOKENS)
        evicted = await until_all_caches_are_known(client)
        assert evicted.num_index_entries <= 2 * NUM_BLOCKS
        third = await greedy(client, longer, NUM_TOKENS)
        assert third.finished.usage.num_cached_tokens == 0
        assert tokens_in_decode_caches(await client.cluster()) == (num_cached, num_cached)
        assert token_ids(third) == token_ids(second)


async def is_gone(client: AsyncClient, worker_id: str) -> bool:
    workers = (await client.cluster()).workers
    return not any(worker.connected and worker.worker_id == worker_id for worker in workers)
