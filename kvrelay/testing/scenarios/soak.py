"""Hours of streams under random faults. Do surviving processes grow?"""

import asyncio
import resource
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.fault_storm import FaultStorm
from kvrelay.testing.footprint import Footprint, footprint_of
from kvrelay.testing.load import fault_free_tokens
from kvrelay.testing.scenarios.random_faults import (
    ENGINE,
    REQUEST_SETTINGS,
    Streams,
    check_end,
    make_requests,
    run_beside,
    storm_figures,
)

MORTAL = frozenset({"gateway-1", "prefill-1", "decode-1"})
"""These may be killed. The others are measured."""


async def soak(
    minutes: float = 60.0,
    num_clients: int = 4,
    num_tokens: int = 120,
    num_warm_up_streams: int = 1600,
    rest_s: float = 0.2,
    longest_pause_s: float = 1.0,
    seed: int = 1,
) -> dict[str, Any]:
    """Growth of the processes that survive hours of random faults: memory, descriptors, tasks.

    SIGTERM and SIGINT end it early, after the running streams. Logged errors go to stderr.
    """
    began_at = time.monotonic()
    logging: dict[str, Any] = {"server": {"log_format": "json"}, "on_line": _show_error}
    async with FaultCluster(
        num_gateways=2, num_prefill=2, num_decode=2, requests=REQUEST_SETTINGS, engine=ENGINE, **logging
    ) as cluster:
        async with cluster.client() as client:
            expected = await fault_free_tokens(client, make_requests(seed, num_tokens), num_clients)
        storm, streams = FaultStorm(cluster, seed, MORTAL, longest_pause_s), Streams(cluster, expected, seed)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, streams.end)
        await streams.run(num_clients, num_warm_up_streams, rest_s=rest_s)
        await cluster.check()
        await cluster.take_baseline()
        before = await footprints(cluster)
        begin = time.monotonic()
        await run_beside(storm, streams.run(num_clients, None, begin + minutes * 60, rest_s), streams.report)
        duration_s = time.monotonic() - begin
        # Blocks, references, buffers, tasks, keys, descriptors, edges.
        await check_end(cluster, streams.report)
        after = await footprints(cluster)
    growth = {name: after[name].growth_since(before[name]) for name in before}
    return {
        **streams.report.figures(),
        **storm_figures(storm),
        "minutes": round(duration_s / 60, 1),
        "cores": round(_cpu_s() / (time.monotonic() - began_at), 2),
        "at_the_start": {name: footprint.figures() for name, footprint in before.items()},
        "at_the_end": {name: footprint.figures() for name, footprint in after.items()},
        "growth_percent": growth,
        "more_objects": {name: after[name].more_objects_since(before[name]) for name in before},
        "most_memory_growth_percent": max(each["resident_bytes"] for each in growth.values()),
    }


def _show_error(name: str, line: str) -> None:
    if '"level": "error"' in line:  # not parsed: a killed process may leave half a line
        print(f"{name}: {line}", file=sys.stderr, flush=True)


def _cpu_s() -> float:
    """Of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def footprints(cluster: FaultCluster) -> Mapping[str, Footprint]:
    survivors = [process for name, process in cluster.processes.items() if name not in MORTAL]
    return {process.name: await footprint_of(process) for process in survivors}
