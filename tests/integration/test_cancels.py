"""Many clients that change their minds: no hang, one terminal for every stream, and nothing left in
the pools.
"""

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient
from kvrelay.errors import CancelledRequestError
from tests.integration.clusters import assert_at_rest, cluster_of, engine, random_prompt, wait_until
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NUM_CLIENTS = 16
NUM_REQUESTS = 20
NUM_SOAK_REQUESTS = 2000
MAX_TOKENS = 24
MANY_TOKENS = 400
"""Of a request that is to be cancelled: it has not ended by itself when the cancel comes."""


@pytest.mark.parametrize(
    "num_requests", [NUM_REQUESTS, pytest.param(NUM_SOAK_REQUESTS, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
async def test_sixteen_clients_with_random_cancels_leave_nothing_behind(tmp_path: Path, num_requests: int) -> None:
    settings = engine(make_tiny_model("llama", tmp_path), num_kv_blocks=256, prefill_chunk_tokens=64)
    terminals: Counter[str] = Counter()
    async with cluster_of([settings], [settings, settings], local_prefill_tokens=24) as cluster:
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_CLIENTS):
                group.create_task(run_client(cluster.gateway_address, number, num_requests, terminals))
        async with AsyncClient(cluster.gateway_address) as client:
            await assert_at_rest(client)

            async def all_ended() -> bool:
                return not (await client.list_requests(active_only=True)).requests

            await wait_until(all_ended, "the store, which is written behind the streams, knows every end")
    print(dict(terminals))
    assert sum(terminals.values()) == NUM_CLIENTS * num_requests
    assert set(terminals) == {"finished", "cancelled by call", "disconnected"}
    assert min(terminals.values()) > num_requests


async def run_client(address: str, number: int, num_requests: int, terminals: Counter[str]) -> None:
    generator = random.Random(number)
    async with AsyncClient(address) as client:
        for _ in range(num_requests):
            terminals[await run_request(client, generator)] += 1


async def run_request(client: AsyncClient, generator: random.Random) -> str:
    """One request; after a random number of deltas it is left alone, cancelled by call, or its
    stream is dropped.
    """
    ending = generator.choice(["finish", "call", "disconnect"])
    after = generator.randrange(0, MAX_TOKENS // 2)
    prompt = random_prompt(generator.randrange(10), generator.choice([3, 30, 100]))
    num_sequences = generator.choice([1, 1, 1, 2])
    max_tokens = MAX_TOKENS if ending == "finish" else MANY_TOKENS
    stream = client.generate(
        token_ids=prompt,
        max_tokens=max_tokens,
        ignore_eos=True,
        n=num_sequences,
        seed=generator.randrange(99),
        timeout_s=60,
    )
    num_tokens = 0
    try:
        async for delta in stream:
            num_tokens += len(delta.tokens)
            if num_tokens > after and ending == "disconnect":
                await stream.cancel()
                return "disconnected"
            if num_tokens > after and ending == "call" and stream.accepted is not None:
                await client.cancel(stream.accepted.request_id)
                ending = "called"
    except CancelledRequestError:
        assert ending == "called"
        assert stream.finished is None
        return "cancelled by call"
    assert stream.finished is not None
    assert num_tokens == max_tokens * num_sequences
    return "finished"
