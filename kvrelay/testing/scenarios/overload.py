"""Overload."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError, OverloadedError
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import fault_free_tokens, make_request
from kvrelay.testing.scenarios.disconnects import percentile

MAX_RUNNING_REQUESTS = 16
RAMP_SHARE = 0.2  # of a load's time, before counting starts


@dataclass(slots=True)
class Load:
    begin: float
    seconds: float
    num_done: int = 0
    refusals_ms: list[float] = field(default_factory=list)
    num_without_retry_info: int = 0
    num_failed: int = 0

    @property
    def counts_from(self) -> float:
        return self.begin + self.seconds * RAMP_SHARE

    @property
    def end(self) -> float:
        return self.begin + self.seconds

    @property
    def done_per_s(self) -> float:
        """Successful requests in the counted time."""
        return self.num_done / (self.seconds * (1 - RAMP_SHARE))


async def overload(seconds: float = 20.0, num_tokens: int = 100, factor: float = 5.0) -> dict[str, Any]:
    """Goodput, and time to refuse, at `factor` times the rate that can be served."""
    requests = {"local_prefill_tokens": 0, "max_running_requests": MAX_RUNNING_REQUESTS}
    async with (
        FaultCluster(requests=requests, engine={"num_kv_blocks": 1024}) as cluster,
        _direct_client(cluster) as client,
    ):
        await fault_free_tokens(client, [make_request(number, num_tokens=num_tokens) for number in range(16)], 8)
        peaks = [await _closed(client, num_clients, seconds, num_tokens) for num_clients in (8, MAX_RUNNING_REQUESTS)]
        peak = max(load.done_per_s for load in peaks)
        flood = await _open(client, factor * peak, seconds, num_tokens)
        await cluster.check()
    refusals_ms = sorted(flood.refusals_ms)
    return {
        "peak_requests_per_s": round(peak, 2),
        "arrivals_per_s": round(factor * peak, 2),
        "requests_per_s": round(flood.done_per_s, 2),
        "goodput_share": round(flood.done_per_s / peak, 3),
        "refused": len(refusals_ms),
        "refused_without_retry_info": flood.num_without_retry_info,
        "refused_after_p50_ms": round(percentile(refusals_ms, 0.5), 1) if refusals_ms else None,
        "refused_after_p99_ms": round(percentile(refusals_ms, 0.99), 1) if refusals_ms else None,
        "failed": flood.num_failed + sum(load.num_failed for load in peaks),
    }


def _direct_client(cluster: FaultCluster) -> AsyncClient:
    """Not through the proxy, whose CPU time would slow the served requests."""
    return AsyncClient(f"127.0.0.1:{cluster['gateway'].proxy.port_of_target}")


async def _closed(client: AsyncClient, num_clients: int, seconds: float, num_tokens: int) -> Load:
    """A closed loop: each client sends one request after the other."""
    load = Load(time.monotonic(), seconds)
    numbers = iter(range(num_clients * 1_000_000, num_clients * 2_000_000))

    async def run_client() -> None:
        while time.monotonic() < load.end:
            await _run(client, next(numbers), num_tokens, load)

    await asyncio.gather(*(run_client() for _ in range(num_clients)))
    return load


async def _open(client: AsyncClient, per_s: float, seconds: float, num_tokens: int) -> Load:
    """An open loop: requests arrive at a fixed rate."""
    load = Load(time.monotonic(), seconds)
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(load.begin + number / per_s - time.monotonic(), 0.0))
            group.create_task(_run(client, number, num_tokens, load))
    return load


async def _run(client: AsyncClient, number: int, num_tokens: int, load: Load) -> None:
    begin = time.monotonic()
    try:
        await client.complete(**make_request(number, num_tokens=num_tokens).options)
    except OverloadedError as error:
        load.refusals_ms.append((time.monotonic() - begin) * 1000)
        load.num_without_retry_info += not error.retry_after_ms
    except KvrelayError:
        load.num_failed += 1
    else:
        load.num_done += load.counts_from <= time.monotonic() <= load.end
