"""The only decode worker dies under load, and a supervisor starts it again: everybody waits for it, and nothing is lost."""

import asyncio
import time
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.scenarios.lasting_load import ENGINE, RELAY, LastingLoad, make_requests


async def sole_decode_worker(num_clients: int = 8, num_tokens: int = 300, num_kills: int = 3) -> dict[str, Any]:
    """The only decode worker is killed, and a supervisor starts it again; seconds until it takes work, at the longest.

    Args:
        num_clients: at once.
        num_tokens: of each output.
        num_kills: one after the other, two seconds after the worker is back each.
    """
    back_after_s: list[float] = []
    async with FaultCluster(num_prefill=1, num_decode=1, relay=RELAY, engine=ENGINE, restart=True) as cluster:
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
