"""A rolling restart, or upgrade."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvrelay.cluster.local_cluster import Role, serve_command
from kvrelay.own_packages import own_module_command
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.scenarios.lasting_load import ENGINE, REQUEST_SETTINGS, LastingLoad, compare_stored, make_requests


async def rolling_restart(
    num_clients: int = 8,
    num_tokens: int = 200,
    num_rounds: int = 2,
    drain_timeout_s: float = 20.0,
    from_checkout: str = "",
    secured: bool = False,
) -> dict[str, Any]:
    """Restarts every process in turn with SIGTERM, under load. No client sees an error.

    One request of three is not resumable. With `from_checkout`, a folder of another version, each
    process's first restart upgrades it.
    """
    drains_s: list[float] = []
    server = {"drain_timeout_ms": int(drain_timeout_s * 1000)}
    cluster = FaultCluster(
        num_gateways=2,
        num_prefill=2,
        num_decode=2,
        requests=REQUEST_SETTINGS,
        engine=ENGINE,
        server=server,
        secured=secured,
        command=upgrading_command(from_checkout, num_old=6) if from_checkout else serve_command,
    )
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


def upgrading_command(checkout: str, num_old: int) -> Callable[[Role], Sequence[str]]:
    module = Path(checkout, "kvrelay", "run_module.py").resolve(strict=True)
    num_starts = 0

    def command(role: Role) -> Sequence[str]:
        nonlocal num_starts
        num_starts += 1
        is_old = num_starts <= num_old
        return own_module_command("kvrelay.cli", "serve", role, run_module=module) if is_old else serve_command(role)

    return command
