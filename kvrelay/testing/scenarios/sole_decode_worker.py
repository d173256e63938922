"""Losses of the only decode worker."""

import asyncio
import time
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, LastingLoad, make_requests


async def sole_decode_worker(num_clients: int = 8, num_tokens: int = 300, num_kills: int = 3) -> dict[str, Any]:
    """Kills the only decode worker; the longest time in seconds until it takes jobs again."""
    back_after_s: list[float] = []
    async with FaultCluster(
        num_prefill=1, num_decode=1, requests=REQUEST_SETTINGS, engine=ENGINE, restart=True
    ) as cluster:
        worker = cluster["decode-0"]

        async def kill_again_and_again() -> None:
            for _ in range(num_kills):
                await asyncio.sleep(2.0)
                begin, num_restarts = time.monotonic(), worker.num_restarts
                await worker.kill()
                await worker.wait_until_restarted(num_restarts)
                await cluster.wait_until_ready()
                back_after_s.append(time.monotonic() - begin)
            await asyncio.sleep(2.0)

        load = LastingLoad(cluster, make_requests(8 * num_clients, num_tokens=num_tokens), num_clients)
        await load.run(kill_again_and_again)
        await cluster.check()
    return {**load.figures(), "kills": len(back_after_s), "back_after_s": round(max(back_after_s), 2)}
