"""Rows of the catalogue about Redis: down, slow, restored from an older state, out of memory. Streams do not notice."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from kvrelay.client import RequestState
from kvrelay.errors import OverloadedError, RequestNotFoundError, UnavailableError
from kvrelay.testing import wait_until
from kvrelay.testing.load import Request
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


async def is_degraded(rig: Rig) -> bool:
    return (await rig.client.cluster()).degraded


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(300)])])
async def test_redis_down_is_not_noticed_by_streams_and_new_requests_go_by_the_last_known_workers(rig: Rig, seconds: int) -> None:
    running, fresh = rig.request(num_tokens=450), rig.request()
    expected = [await rig.expected(running), await rig.expected(fresh)]
    stream = asyncio.create_task(rig.run(running))
    async with stopped_valkey(rig):
        begin = time.monotonic()
        outcome = await rig.run(fresh)
        assert outcome.error is None
        assert outcome.tokens == expected[1]
        await wait_until(lambda: is_degraded(rig), "health says degraded")
        while time.monotonic() - begin < seconds:
            assert (await rig.run(fresh)).tokens == expected[1]
    recovered_at = time.monotonic()
    done = await stream
    assert done.error is None
    assert done.tokens == expected[0]
    assert done.num_attempts == 1
    assert await _recovers(rig)
    assert time.monotonic() - recovered_at < 10


async def _recovers(rig: Rig) -> bool:
    async def healthy() -> bool:
        return not await is_degraded(rig)

    await wait_until(healthy, "the breaker closes")
    return True


async def test_a_slow_redis_costs_its_timeout_once(rig: Rig) -> None:
    request = rig.request()
    expected = await rig.expected(request)
    for link in rig.cluster.valkey_proxy.links():
        link.to_source.latency_s = 6.0
    begin = time.monotonic()
    outcome = await rig.run(request)
    assert outcome.error is None
    assert outcome.tokens == expected
    assert time.monotonic() - begin < 6.0, "nothing waits for it"
    rig.cluster.heal()
    assert await _recovers(rig)


async def _stream_while_writes_are_lost(rig: Rig, request: Request) -> tuple[str, list[int], bool]:
    """A request in the middle of which Redis goes back to an older state.

    Returns:
        Its id and tokens, and whether it was still running then: of one that had ended before nobody knows more than Redis.
    """
    tokens: list[int] = []
    dump: dict[bytes, tuple[int, bytes]] = {}
    was_running: bool | None = None
    client: redis.asyncio.Redis
    async with redis.asyncio.Redis.from_url(rig.cluster.redis_url, protocol=2) as client:
        stream = rig.client.generate(**request.options)
        async for delta in stream:
            tokens += [token.token_id for token in delta.tokens]
            if len(tokens) > 5 and not dump:
                async for key in client.scan_iter(match="kvrelay:*"):
                    value, ttl_ms = await client.dump(key), await client.pttl(key)
                    if value is not None:
                        dump[key] = (max(ttl_ms, 0), value)
            if len(tokens) > 30 and was_running is None:
                assert dump, "there was something to go back to"
                assert stream.accepted is not None
                await client.flushall()
                for key, (ttl_ms, value) in dump.items():
                    await client.restore(key, ttl_ms, value, replace=True)
                was_running = (await rig.client.get_request(stream.accepted.request_id)).state is not RequestState.SUCCEEDED
        if was_running is False:
            await client.flushall()  # the older state of a request that nobody will write again
    assert was_running is not None, "writes were lost"
    assert stream.accepted is not None
    return stream.accepted.request_id, tokens, was_running


async def test_redis_loses_writes_in_a_failover_and_the_owner_writes_again(rig: Rig) -> None:
    request = rig.request(num_tokens=450)
    expected = await rig.expected(request)
    for _ in range(6):
        request_id, tokens, was_running = await _stream_while_writes_are_lost(rig, request)
        assert tuple(tokens) == expected[0]
        if was_running:
            break
    else:
        pytest.fail("the request always ended before its writes were lost")

    async def written() -> bool:
        async with rig.cluster.client("gateway-1") as other:
            try:
                info = await other.get_request(request_id)
            except (RequestNotFoundError, UnavailableError):  # lost as a whole and not written yet, or Redis is slow
                return False
        return info.state is RequestState.SUCCEEDED and info.num_output_tokens == len(tokens)

    await wait_until(written, "the store knows the end")


async def test_redis_out_of_memory_refuses_new_work_and_keeps_what_runs(rig: Rig) -> None:
    running = rig.request(num_tokens=450)
    expected = await rig.expected(running)
    stream = asyncio.create_task(rig.run(running))

    async def is_running() -> bool:
        return bool((await rig.client.cluster()).running_requests)

    await wait_until(is_running, "the request runs")
    client: redis.asyncio.Redis
    async with redis.asyncio.Redis.from_url(rig.cluster.redis_url, protocol=2) as client:
        await client.config_set("maxmemory", "1mb")
        try:
            refusals: list[OverloadedError] = []

            async def refused() -> bool:
                outcome = await rig.run(rig.request(num_tokens=2))
                assert outcome.error is None or isinstance(outcome.error, OverloadedError)
                refusals.extend([outcome.error] if isinstance(outcome.error, OverloadedError) else [])
                return bool(refusals)

            await wait_until(refused, "new work is refused")
            assert refusals[0].retry_after_ms > 0
        finally:
            await client.config_set("maxmemory", "256mb")
    done = await stream
    assert done.error is None
    assert done.tokens == expected

    async def accepted() -> bool:
        return (await rig.run(rig.request(num_tokens=2))).error is None

    await wait_until(accepted, "new work is taken again")
