"""Kills workers under load."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import LoadReport, Request, fault_free_tokens, run_load
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, make_requests


async def run_under_faults(
    cluster: FaultCluster, requests: Sequence[Request], num_clients: int, harm: Callable[[], Awaitable[None]]
) -> tuple[LoadReport, float]:
    """Runs the load beside `harm`; returns the report and the load's seconds."""
    async with cluster.client() as client:
        expected = await fault_free_tokens(client, requests, num_clients)
    await cluster.check()
    await cluster.take_baseline()
    harming = asyncio.ensure_future(harm())
    begin = time.monotonic()
    try:
        report = await run_load(cluster.addresses, requests, expected, num_clients, cluster.connect)
    finally:
        duration_s = time.monotonic() - begin
        harming.cancel()
        await asyncio.gather(harming, return_exceptions=True)
    if not harming.cancelled():
        harming.result()
    return report, duration_s


async def kill_matrix(
    num_clients: int = 8,
    num_requests: int = 100,
    num_tokens: int = 200,
    every_s: float = 10.0,
    secured: bool = False,
) -> dict[str, Any]:
    """Kills one of two prefill or decode workers every `every_s`, in turn, and restarts it."""
    num_kills = 0
    async with FaultCluster(
        num_prefill=2, num_decode=2, requests=REQUEST_SETTINGS, engine=ENGINE, secured=secured
    ) as cluster:
        victims = itertools.cycle(["decode-0", "prefill-0", "decode-1", "prefill-1"])

        async def harm() -> None:
            nonlocal num_kills
            while True:
                await asyncio.sleep(every_s / 2)
                victim = cluster[next(victims)]
                await victim.kill()
                assert not victim.is_running
                num_kills += 1
                await victim.start_again()
                await asyncio.sleep(every_s / 2)

        requests = make_requests(num_clients * num_requests, num_tokens=num_tokens)
        report, duration_s = await run_under_faults(cluster, requests, num_clients, harm)
        await _make_whole(cluster)
    return {**report.figures(), "kills": num_kills, "seconds": round(duration_s, 1), "_report": report}


async def _make_whole(cluster: FaultCluster) -> None:
    cluster.heal()
    await cluster.restart_ended()
    await cluster.check()
