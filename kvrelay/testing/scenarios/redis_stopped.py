"""Redis stands still, or is out of memory."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio

from kvrelay.client import AsyncClient
from kvrelay.core.request_state import is_terminal
from kvrelay.errors import KvrelayError, OverloadedError
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.state_store import StateStore
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import LoadReport, make_request, run_request
from kvrelay.testing.process_files import state_of
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, LastingLoad, compare_stored, make_requests
from kvrelay.testing.waiting import wait_until

BEFORE_AND_AFTER_S = 2.0
KEEPING_SETTINGS = {**REQUEST_SETTINGS, "keep_outputs": True}
"""So that all that succeeded can be compared."""
RECOVERY_TIMEOUT_S = 60.0
MAX_MISSED_TOKENS = 50_000
"""Of ended requests. A gateway keeps 100,000 frames while Redis is away, and drops older ones."""


async def redis_stopped(
    num_clients: int = 8,
    num_tokens: int = 300,
    stop_s: float = 30.0,
    redis_timeout_ms: int = 200,
    secured: bool = False,
) -> dict[str, Any]:
    """Stops Valkey under load, for `stop_s` or until gateways keep MAX_MISSED_TOKENS for it.

    Seconds until the gateway recovers and has stored what it missed.
    """
    figures: dict[str, float] = {}
    server = {"redis_timeout_ms": redis_timeout_ms}
    async with (
        FaultCluster(requests=KEEPING_SETTINGS, engine=ENGINE, server=server, secured=secured) as cluster,
        cluster.client() as client,
    ):
        load = LastingLoad(cluster, make_requests(8 * num_clients, num_tokens=num_tokens), num_clients)

        def missed_tokens(num_before: int) -> int:
            return sum(len(tokens) for each in load.report.outcomes[num_before:] for tokens in each.tokens)

        async def stop() -> None:
            await asyncio.sleep(BEFORE_AND_AFTER_S)
            num_before = len(load.report.outcomes)
            pid = cluster.valkey.pid
            os.kill(pid, signal.SIGSTOP)
            try:
                await wait_until(lambda: state_of(pid) == "T", "Valkey is stopped")
                begin = time.monotonic()
                await _wait(lambda: _is_degraded(client), "the gateway has noticed")
                while time.monotonic() < begin + stop_s and missed_tokens(num_before) < MAX_MISSED_TOKENS:  # noqa: ASYNC110 - it ends by time too
                    await asyncio.sleep(0.1)
                figures["stopped_s"] = round(time.monotonic() - begin, 1)
                assert state_of(pid) == "T", "no other process has continued it"
            finally:
                os.kill(pid, signal.SIGCONT)
            missed = [each.request_id for each in load.report.outcomes[num_before:] if each.request_id is not None]
            figures["ended_meanwhile"] = len(missed)
            begin = time.monotonic()
            await _wait(lambda: _is_well(client), "the gateway keeps state again")
            figures["recovery_s"] = round(time.monotonic() - begin, 2)
            await _wait(lambda: _are_stored(cluster, missed), "what was missed is stored")
            figures["caught_up_s"] = round(time.monotonic() - begin, 2)
            await asyncio.sleep(BEFORE_AND_AFTER_S)

        await load.run(stop)
        await cluster.check()
        stored = await compare_stored(cluster, load.report, all_are_kept=True)
    return {**load.figures(), **stored, **figures}


async def redis_full(
    num_clients: int = 8,
    num_tokens: int = 300,
    full_s: float = 10.0,
    max_memory_kib: int = 1024,
    redis_timeout_ms: int = 200,
) -> dict[str, Any]:
    """Fills Valkey's memory: accepted requests go on, others get RESOURCE_EXHAUSTED and
    RetryInfo.
    """
    figures: dict[str, float] = {}
    server = {"redis_timeout_ms": redis_timeout_ms}
    async with (
        FaultCluster(requests=KEEPING_SETTINGS, engine=ENGINE, server=server) as cluster,
        cluster.client() as client,
    ):
        load = LastingLoad(cluster, make_requests(8 * num_clients, num_tokens=num_tokens), num_clients)

        async def fill() -> None:
            await asyncio.sleep(BEFORE_AND_AFTER_S)
            store: redis.asyncio.Redis
            async with redis.asyncio.Redis.from_url(cluster.redis_url, protocol=2) as store:
                await store.config_set("maxmemory", f"{max_memory_kib}kb")
                try:
                    await asyncio.sleep(full_s)
                finally:
                    await store.config_set("maxmemory", f"{cluster.valkey_mib}mb")
            begin = time.monotonic()
            await _wait(lambda: _is_accepted(client), "new requests are accepted")
            figures["accepted_again_s"] = round(time.monotonic() - begin, 2)
            await asyncio.sleep(BEFORE_AND_AFTER_S)

        await load.run(fill)
        await cluster.check()
        refused = _take_refused(load.report)
        assert refused > 0, "nothing was refused: the fault did not happen"
        stored = await compare_stored(cluster, load.report, all_are_kept=True)
    return {**load.figures(), **stored, "full_s": full_s, "refused": refused, **figures}


def _take_refused(report: LoadReport) -> int:
    """Removes correct refusals from the report."""
    refused = [
        outcome
        for outcome in report.outcomes
        if isinstance(outcome.error, OverloadedError)
        and outcome.error.retry_after_ms > 0
        and outcome.request_id is None
    ]
    report.outcomes = [outcome for outcome in report.outcomes if outcome not in refused]
    return len(refused)


async def _is_degraded(client: AsyncClient) -> bool:
    return (await client.cluster()).degraded


async def _is_well(client: AsyncClient) -> bool:
    return not (await client.cluster()).degraded


async def _is_accepted(client: AsyncClient) -> bool:
    return (await run_request(client, make_request(0, num_tokens=2, tenant="probe"))).error is None


async def _are_stored(cluster: FaultCluster, request_ids: list[str]) -> bool:
    async with RedisConnection(cluster.redis_url, 5000) as connection:
        store = StateStore(connection, "scenario")
        records = [await store.get(request_id) for request_id in request_ids]
    return all(record is not None and is_terminal(record.state) for record in records)


async def _wait(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    async def is_so() -> bool:
        try:
            return await condition()
        except KvrelayError:
            return False

    await wait_until(is_so, what, RECOVERY_TIMEOUT_S)
