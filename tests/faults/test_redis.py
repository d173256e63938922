"""Rows of the catalogue about Redis: down, slow, restored from an older state, out of memory.
Streams do not notice.
"""

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from kvrelay.client import AsyncClient, RequestState
from kvrelay.errors import OverloadedError, RequestNotFoundError, UnavailableError
from kvrelay.testing import wait_until
from kvrelay.testing.process_files import state_of
from tests.faults.conftest import Rig

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]


@asynccontextmanager
async def stopped_valkey(rig: Rig) -> AsyncIterator[None]:
    pid = rig.cluster.valkey.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await wait_until(lambda: state_of(pid) == "T", "Valkey is stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


REDIS_LATENCY_S = 40.0
"""Far more than gateways and workers wait for an answer, and than a request takes on any machine.
"""


async def is_degraded(rig: Rig) -> bool:
    return (await rig.client.cluster()).degraded


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(300)])])
async def test_redis_down_is_not_noticed_by_streams_and_new_requests_go_by_the_last_known_workers(
    rig: Rig, seconds: int
) -> None:
    running, fresh = rig.request(num_tokens=100), rig.request()
    expected = [await rig.expected(running), await rig.expected(fresh)]
    async with rig.held(running) as held, stopped_valkey(rig):
        begin = time.monotonic()
        outcome = await rig.run(fresh)
        assert outcome.error is None
        assert outcome.tokens == expected[1]
        await wait_until(lambda: is_degraded(rig), "health says degraded")
        held.release()
        done = await held.outcome
        while time.monotonic() - begin < seconds:
            assert (await rig.run(fresh)).tokens == expected[1]
    assert done.error is None
    assert done.tokens == expected[0]
    assert done.num_attempts == 1
    assert await _recovers(rig)


async def _recovers(rig: Rig) -> bool:
    async def healthy() -> bool:
        return not await is_degraded(rig)

    await wait_until(healthy, "the breaker closes")
    return True


async def test_a_slow_redis_costs_its_timeout_once(rig: Rig) -> None:
    request = rig.request()
    expected = await rig.expected(request)
    for link in rig.cluster.valkey_proxy.links():
        link.to_source.latency_s = REDIS_LATENCY_S
    outcome = await rig.run(request)
    assert outcome.error is None
    assert outcome.tokens == expected
    assert outcome.duration_s < REDIS_LATENCY_S, "nothing waits for it"
    rig.cluster.heal()
    assert await _recovers(rig)


async def test_redis_loses_writes_in_a_failover_and_the_owner_writes_again(rig: Rig) -> None:
    request = rig.request(num_tokens=100)
    expected = await rig.expected(request)
    async with (
        rig.held(request) as held,
        rig.cluster.client("gateway-1") as other,
        redis.asyncio.Redis.from_url(rig.cluster.redis_url, protocol=2) as store,
    ):
        (running,) = (await rig.client.cluster()).running_requests
        request_id = running.request_id
        num_early = await _stored_tokens(other, request_id, more_than=0)
        older = await _dump(store)
        num_dumped = await _stored_tokens(other, request_id, more_than=0)
        await held.move_on()
        num_late = await _stored_tokens(other, request_id, more_than=num_dumped)
        num_kept = await _go_back_to(store, older, request_id)
        assert num_early <= num_kept < num_late < request.num_tokens, "writes were lost in the middle"
        held.release()
        outcome = await held.outcome
        assert outcome.error is None
        assert outcome.tokens == expected
        assert await _stored_tokens(other, request_id, more_than=request.num_tokens - 1) == request.num_tokens

        async def has_ended() -> bool:
            return (await other.get_request(request_id)).state is RequestState.SUCCEEDED

        await wait_until(has_ended, "the store knows the end")


async def _stored_tokens(other: AsyncClient, request_id: str, *, more_than: int) -> int:
    """How many tokens of the request the store has, once they are so many; asked of a gateway that
    is not its owner.
    """
    found = 0

    async def written() -> bool:
        nonlocal found
        try:
            found = (await other.get_request(request_id)).num_output_tokens
        except (RequestNotFoundError, UnavailableError):  # not written yet, or Redis is slow
            return False
        return found > more_than

    await wait_until(written, f"the store has more than {more_than} tokens")
    return found


async def _dump(store: "redis.asyncio.Redis") -> dict[bytes, tuple[int, bytes]]:
    """Time to live and value of each key."""
    found: dict[bytes, tuple[int, bytes]] = {}
    async for key in store.scan_iter(match="kvrelay:*"):
        value, ttl_ms = await store.dump(key), await store.pttl(key)
        if value is not None:
            found[key] = (max(ttl_ms, 0), value)
    return found


async def _go_back_to(store: "redis.asyncio.Redis", older: dict[bytes, tuple[int, bytes]], request_id: str) -> int:
    """At once, as in a failover: nobody writes in between. How many tokens the store has of the
    request then.
    """
    async with store.pipeline(transaction=True) as steps:
        steps.flushall()
        for key, (ttl_ms, value) in older.items():
            steps.restore(key, ttl_ms, value, replace=True)
        steps.hget(f"kvrelay:{{{request_id}}}:request", "num_output_tokens")
        return int((await steps.execute())[-1])


async def test_redis_out_of_memory_refuses_new_jobs_and_keeps_what_runs(rig: Rig) -> None:
    running = rig.request(num_tokens=100)
    expected = await rig.expected(running)
    client: redis.asyncio.Redis
    async with rig.held(running) as held, redis.asyncio.Redis.from_url(rig.cluster.redis_url, protocol=2) as client:
        await client.config_set("maxmemory", "1mb")
        try:
            refusals: list[OverloadedError] = []

            async def refused() -> bool:
                outcome = await rig.run(rig.request(num_tokens=2))
                assert outcome.error is None or isinstance(outcome.error, OverloadedError)
                refusals.extend([outcome.error] if isinstance(outcome.error, OverloadedError) else [])
                return bool(refusals)

            await wait_until(refused, "new jobs is refused")
            assert refusals[0].retry_after_ms > 0
            held.release()
            done = await held.outcome
        finally:
            await client.config_set("maxmemory", "256mb")
    assert done.error is None
    assert done.tokens == expected

    async def accepted() -> bool:
        return (await rig.run(rig.request(num_tokens=2))).error is None

    await wait_until(accepted, "new requests are taken again")
