"""Workers are killed, terminated or stopped again and again under load, and every output is compared with the undisturbed one."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import LoadReport, Request, fault_free_tokens, make_request, run_load
from kvrelay.testing.process import FaultProcess

RELAY = {"local_prefill_tokens": 0, "worker_wait_ms": 60_000}
ENGINE = {"num_kv_blocks": 512}


def make_requests(number: int, *, num_tokens: int, resumable: bool = False) -> list[Request]:
    """Every second one greedy, the others seeded; every tenth has two sequences."""
    return [
        make_request(
            each, 30 + each % 70, num_tokens=num_tokens, num_sequences=1 + (each % 10 == 9), resumable=resumable, timeout_s=120.0
        )
        for each in range(number)
    ]


async def run_under_faults(
    cluster: FaultCluster, requests: Sequence[Request], num_clients: int, harm: Callable[[], Awaitable[None]]
) -> tuple[LoadReport, float]:
    """Runs the load, and `harm` beside it until that is over or the load is; the report and its seconds."""
    async with cluster.client() as client:
        expected = await fault_free_tokens(client, requests, num_clients)
    await cluster.check()
    await cluster.take_baseline()
    harming = asyncio.ensure_future(harm())
    begin = time.monotonic()
    try:
        report = await run_load(cluster.addresses, requests, expected, num_clients)
    finally:
        duration_s = time.monotonic() - begin
        harming.cancel()
        await asyncio.gather(harming, return_exceptions=True)
    if not harming.cancelled():
        harming.result()
    return report, duration_s


async def kill_matrix(
    num_clients: int = 8, num_requests: int = 100, num_tokens: int = 200, every_s: float = 10.0
) -> dict[str, Any]:
    """One of two prefill or decode workers is killed with SIGKILL every `every_s`, in turn; each starts again by itself.

    Args:
        num_clients: at once.
        num_requests: of each client.
        num_tokens: of each output.
        every_s: between two kills.
    """
    num_kills = 0
    async with FaultCluster(num_prefill=2, num_decode=2, relay=RELAY, engine=ENGINE) as cluster:
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


async def sole_decode_worker(
    num_clients: int = 8, num_requests: int = 25, num_tokens: int = 300, num_kills: int = 3
) -> dict[str, Any]:
    """The only decode worker is killed, and a supervisor starts it again."""
    done = 0
    async with FaultCluster(num_prefill=1, num_decode=1, relay=RELAY, engine=ENGINE, restart=True) as cluster:

        async def harm() -> None:
            nonlocal done
            for _ in range(num_kills):
                await asyncio.sleep(2.0)
                num_restarts = cluster["decode-0"].num_restarts
                await cluster["decode-0"].kill()
                done += 1
                await _until_restarted(cluster["decode-0"], num_restarts)
                await cluster.wait_until_ready()

        requests = make_requests(num_clients * num_requests, num_tokens=num_tokens)
        report, duration_s = await run_under_faults(cluster, requests, num_clients, harm)
        await cluster.wait_until_ready()
        await cluster.check()
    return {**report.figures(), "kills": done, "seconds": round(duration_s, 1), "_report": report}


async def rolling_restart(num_clients: int = 8, num_requests: int = 50, num_tokens: int = 200) -> dict[str, Any]:
    """Every process gets SIGTERM, one after the other, and starts again. Clients know both gateways and may resume."""
    num_restarts = 0
    async with FaultCluster(num_gateways=2, num_prefill=2, num_decode=2, relay=RELAY, engine=ENGINE) as cluster:

        async def harm() -> None:
            nonlocal num_restarts
            while True:
                for process in list(cluster.processes.values()):
                    await process.terminate()
                    num_restarts += 1
                    await process.start_again()
                    await cluster.wait_until_ready()

        requests = make_requests(num_clients * num_requests, num_tokens=num_tokens, resumable=True)
        report, duration_s = await run_under_faults(cluster, requests, num_clients, harm)
        await _make_whole(cluster)
    return {**report.figures(), "restarts": num_restarts, "seconds": round(duration_s, 1), "_report": report}


async def zombies(num_clients: int = 4, num_requests: int = 100, num_tokens: int = 300, num_stops: int = 200) -> dict[str, Any]:
    """One of two decode workers is stopped for longer than its window and continued, again and again."""
    done = 0
    async with FaultCluster(num_prefill=1, num_decode=2, relay=RELAY, engine=ENGINE) as cluster:
        requests = make_requests(num_clients * num_requests, num_tokens=num_tokens)
        async with cluster.client() as client:
            expected = await fault_free_tokens(client, requests, num_clients)
        total = LoadReport()
        begin = time.monotonic()

        async def stop_and_continue() -> None:
            nonlocal done
            for victim in itertools.cycle(cluster.of_role("decode")):
                if done == num_stops:
                    return
                await victim.stop()
                await asyncio.sleep(3.0)
                assert victim.state == "T"
                await victim.resume()
                done += 1
                await cluster.wait_until_ready()

        harming = asyncio.ensure_future(stop_and_continue())
        while not harming.done():
            report = await run_load(cluster.addresses, requests, expected, num_clients)
            total.outcomes += report.outcomes
            total.wrong += report.wrong
        harming.result()
        await cluster.check()
    return {**total.figures(), "stops": done, "seconds": round(time.monotonic() - begin, 1), "_report": total}


async def _until_restarted(process: FaultProcess, num_restarts: int) -> None:
    from kvrelay.testing.waiting import wait_until

    await wait_until(lambda: process.num_restarts > num_restarts, f"{process.name} is started again", 60)


async def _make_whole(cluster: FaultCluster) -> None:
    cluster.heal()
    await cluster.restart_ended()
    await cluster.check()
