"""Every process of a cluster is restarted in turn under load, as for a new version of it. No client sees an error."""

import time
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.scenarios.lasting_load import ENGINE, RELAY, LastingLoad, compare_stored, make_requests


async def rolling_restart(
    num_clients: int = 8, num_tokens: int = 200, num_rounds: int = 2, drain_timeout_s: float = 20.0
) -> dict[str, Any]:
    """Every process gets SIGTERM, one after the other, and starts again. Clients know both gateways.

    One request of three is not resumable.

    Args:
        num_clients: at once.
        num_tokens: of each output.
        num_rounds: restarts of each of the six processes.
        drain_timeout_s: for how long a process may let its requests end.
    """
    drains_s: list[float] = []
    server = {"drain_timeout_ms": int(drain_timeout_s * 1000)}
    cluster = FaultCluster(num_gateways=2, num_prefill=2, num_decode=2, relay=RELAY, engine=ENGINE, server=server)
    async with cluster:

        async def restart_all() -> None:
            for process in list(cluster.processes.values()) * num_rounds:
                begin = time.monotonic()
                await process.terminate(drain_timeout_s + 10.0)
                drains_s.append(time.monotonic() - begin)
                await process.start_again()
                await cluster.wait_until_ready()

        load = LastingLoad(cluster, make_requests(8 * num_clients, num_tokens=num_tokens, resumable=None), num_clients)
        await load.run(restart_all)
        await cluster.check()
        stored = await compare_stored(cluster, load.report)
    return {**load.figures(), **stored, "restarts": len(drains_s), "longest_drain_s": round(max(drains_s), 2)}
