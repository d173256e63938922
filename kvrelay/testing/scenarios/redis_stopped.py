"""Redis stands still under load: streams go on, and once it is back, its state is whole again."""

import asyncio
import os
import signal
import time
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.process_files import state_of
from kvrelay.testing.scenarios.kill_matrix import RELAY, make_requests, run_under_faults
from kvrelay.testing.waiting import wait_until


async def redis_stopped(
    num_clients: int = 8, num_requests: int = 60, num_tokens: int = 300, stop_s: float = 30.0
) -> dict[str, Any]:
    """Valkey is stopped for `stop_s` while requests run; seconds until the gateway says that it is not degraded any more."""
    recovery_s: list[float] = []
    server = {"redis_timeout_ms": 200}
    async with FaultCluster(relay=RELAY, engine={"num_kv_blocks": 512}, server=server) as cluster, cluster.client() as client:

        async def harm() -> None:
            await asyncio.sleep(1.0)
            pid = cluster.valkey.pid
            os.kill(pid, signal.SIGSTOP)
            await wait_until(lambda: state_of(pid) == "T", "Valkey is stopped")
            begin = time.monotonic()
            await asyncio.sleep(stop_s)
            assert (await client.cluster()).degraded
            os.kill(pid, signal.SIGCONT)
            begin = time.monotonic()

            async def healthy() -> bool:
                return not (await client.cluster()).degraded

            await wait_until(healthy, "the breaker closes")
            recovery_s.append(time.monotonic() - begin)

        requests = make_requests(num_clients * num_requests, num_tokens=num_tokens)
        harming: asyncio.Task[None] | None = None

        async def harm_and_note() -> None:
            nonlocal harming
            harming = asyncio.create_task(harm())

        report, duration_s = await run_under_faults(cluster, requests, num_clients, harm_and_note)
        assert harming is not None
        await harming
        await cluster.check(30.0)
    return {
        **report.figures(),
        "stopped_s": stop_s,
        "recovery_s": round(recovery_s[0], 2),
        "seconds": round(duration_s, 1),
        "_report": report,
    }
