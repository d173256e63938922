"""GetCluster, `kvrelay status` and Redis agree about a running request; after its end its keys
expire.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from kvrelay.client import AsyncClient, AsyncStream, RequestState
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing import FaultCluster
from tests.integration.clusters import CALM, assert_at_rest, random_prompt, wait_until
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


async def status(address: str) -> dict[str, Any]:
    """What `kvrelay status --json` prints."""
    command = [sys.executable, "-m", "kvrelay.cli", "status", "--json", "--gateway", address]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output)
    return answer


async def stored(store: "redis.Redis", request_id: str) -> dict[str, int]:
    """Every key of the request with what is left of its life, in milliseconds; a key that never
    expires has -1.
    """
    keys = [key async for key in store.scan_iter(match=f"*{{{request_id}}}*")]
    return {key: await store.pttl(key) for key in keys}


async def test_all_views_agree_about_a_request(tmp_path: Path) -> None:
    cluster = FaultCluster(model=make_tiny_model("llama", tmp_path), requests={"local_prefill_tokens": 0}, server=CALM)
    async with (
        cluster,
        cluster.client() as client,
        redis.Redis.from_url(cluster.redis_url, decode_responses=True) as store,
    ):
        fault = cluster["decode-0"].arm("decode.step_begins", FaultAction.WAIT, at=20, wait_ms=50_000)
        stream = client.generate(
            token_ids=random_prompt(1, 50), max_tokens=400, ignore_eos=True, temperature=0.0, timeout_s=60
        )
        reading = asyncio.create_task(stream.completion())
        await fault.wait_until_fired()
        request_id = await accepted_id(stream)
        await assert_views_agree(client, cluster["gateway"].proxy.address, store, request_id)
        fault.disarm()
        assert len((await reading).outputs[0].tokens) == 400

        async def succeeded() -> bool:
            return await store.hget(f"kvrelay:{{{request_id}}}:request", "state") == "SUCCEEDED"

        await wait_until(succeeded, "Redis has the final state")
        request = await client.get_request(request_id)
        assert (request.state, request.num_output_tokens) == (RequestState.SUCCEEDED, 400)
        lives = await stored(store, request_id)
        assert lives
        assert all(0 < life_ms <= 3600000 for life_ms in lives.values())
        await assert_at_rest(client)


async def accepted_id(stream: AsyncStream) -> str:
    """Once the client has read it, which a busy one may do later than the worker computes."""

    async def is_accepted() -> bool:
        return stream.accepted is not None

    await wait_until(is_accepted, "the client has read that its request was accepted")
    assert stream.accepted is not None
    return stream.accepted.request_id


async def assert_views_agree(client: AsyncClient, address: str, store: "redis.Redis", request_id: str) -> None:
    async def decoding_in_redis() -> bool:
        return await store.hget(f"kvrelay:{{{request_id}}}:request", "state") == "DECODING"

    await wait_until(decoding_in_redis, "Redis knows that the request decodes")
    view = await client.cluster()
    (running,) = view.running_requests
    assert (running.request_id, running.state) == (request_id, RequestState.DECODING)
    assert running.decode_worker_id in {worker.worker_id for worker in view.workers}

    answer = await status(address)
    (shown,) = answer["running_requests"]
    assert shown["request_id"] == request_id
    assert shown["state"].lower() == "decoding"
    assert shown["decode_worker_id"] == running.decode_worker_id

    names = ("decode_worker_id", "prefill_worker_id", "gateway_id", "attempt")
    fields = await store.hmget(f"kvrelay:{{{request_id}}}:request", names)
    assert fields == [running.decode_worker_id, running.prefill_worker_id, view.gateway_id, str(running.attempt)]
    assert running.attempt == 1
    listed = await client.list_requests(active_only=True)
    assert [request.request_id for request in listed.requests] == [request_id]
    assert all(life_ms > 0 for life_ms in (await stored(store, request_id)).values())
