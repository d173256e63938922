"""Clients leave at a step, which waits until they are gone."""

import time
from typing import Any

from kvrelay.client import AsyncClient, AsyncStream
from kvrelay.runtime.fault_points import FaultAction
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.load import make_request
from kvrelay.testing.waiting import wait_until

POINTS = {
    "gateway.admitted": "gateway",
    "gateway.reserve_sent": "gateway",
    "gateway.start_prefill_sent": "gateway",
    "gateway.token_emitted": "gateway",
    "decode.job_received": "decode",
    "decode.blocks_reserved": "decode",
    "prefill.job_received": "prefill",
    "prefill.step_begins": "prefill",
    "prefill.layer_written": "prefill",
    "prefill.step_computed": "prefill",
    "prefill.first_token_reported": "prefill",
    "prefill.push_opened": "prefill",
    "prefill.chunk_sent": "prefill",
    "prefill.end_sent": "prefill",
    "prefill.transfer_acknowledged": "prefill",
    "decode.push_begun": "decode",
    "decode.chunk_write_begins": "decode",
    "decode.chunk_written": "decode",
    "decode.push_complete": "decode",
    "decode.step_begins": "decode",
    "decode.step_computed": "decode",
    "decode.tokens_reported": "decode",
}
"""Steps at which clients leave, and the role of their process."""


async def disconnects(num_rounds: int = 20, points: tuple[str, ...] = tuple(POINTS)) -> dict[str, Any]:
    """Clients leave at each step, repeatedly; milliseconds until both workers use no block."""
    times_ms: dict[str, list[float]] = {point: [] for point in points}
    async with FaultCluster(requests={"local_prefill_tokens": 0}) as cluster, cluster.client() as client:
        number = 0
        for _ in range(num_rounds):
            for point in points:
                number += 1
                times_ms[point].append(await disconnect_at(cluster, client, point, number))
        await cluster.check()
    everything = sorted(each for times in times_ms.values() for each in times)
    return {
        "points": len(points),
        "disconnects": len(everything),
        "p50_ms": round(percentile(everything, 0.5), 1),
        "p99_ms": round(percentile(everything, 0.99), 1),
        "worst_ms": round(everything[-1], 1),
        "slowest_point": max(times_ms, key=lambda point: max(times_ms[point])),
        "worst_ms_by_point": {point: round(max(times), 1) for point, times in times_ms.items()},
    }


async def disconnect_at(cluster: FaultCluster, client: AsyncClient, point: str, number: int) -> float:
    request = make_request(number, tenant=f"leaves-{number}", num_tokens=400)
    fault = cluster.arm_one_of(POINTS[point], point, FaultAction.WAIT, wait_ms=1500)
    stream = client.generate(**request.options)
    first = _begin(stream)
    await fault.wait_until_fired()
    left_at = time.monotonic()
    await stream.cancel()
    fault.disarm()
    await first

    async def free() -> bool:
        seen = await client.cluster()
        return not seen.running_requests and not any(worker.load.num_used_blocks for worker in seen.workers)

    await wait_until(free, f"blocks are free after a disconnect at {point}")
    return (time.monotonic() - left_at) * 1000


def _begin(stream: AsyncStream) -> Any:
    import asyncio

    from kvrelay.errors import KvrelayError

    async def read() -> None:
        try:
            async for _ in stream:
                pass
        except KvrelayError:
            pass

    return asyncio.create_task(read())


def percentile(values: list[float], share: float) -> float:
    """Of sorted values."""
    return values[min(int(share * len(values)), len(values) - 1)]
