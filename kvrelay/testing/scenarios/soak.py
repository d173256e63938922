"""Hours of streams under random faults: whether the processes that live through them hold more at the end than at the start."""

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
from kvrelay.testing.scenarios.random_faults import ENGINE, RELAY, Streams, check_end, make_requests, run_beside, storm_figures

MORTAL = frozenset({"gateway-1", "prefill-1", "decode-1"})
"""These are killed; the others live from the start to the end, are stopped and cut off, and are what is measured."""


async def soak(
    minutes: float = 60.0,
    num_clients: int = 4,
    num_tokens: int = 120,
    num_warm_up_streams: int = 1600,
    rest_s: float = 0.2,
    longest_pause_s: float = 1.0,
    seed: int = 1,
) -> dict[str, Any]:
    """Streams under random faults; growth of memory, descriptors, threads and tasks of the processes that live through it all.

    SIGTERM and SIGINT end it early: the streams under way end, and the figures are those of the time until then. What the
    processes log as errors, tracebacks too, goes to stderr.

    Args:
        minutes: of faults.
        num_clients: at once.
        num_tokens: of the longest outputs.
        num_warm_up_streams: before the first measurement, so that what a process keeps within bounds is full.
        rest_s: of each client between two streams; more of it takes less of the machine.
        longest_pause_s: between two faults; a process that is killed takes seconds of a core to start again.
        seed: of the requests and the faults.
    """
    began_at = time.monotonic()
    logging: dict[str, Any] = {"server": {"log_format": "json"}, "on_line": _show_error}
    async with FaultCluster(num_gateways=2, num_prefill=2, num_decode=2, relay=RELAY, engine=ENGINE, **logging) as cluster:
        async with cluster.client() as client:
            expected = await fault_free_tokens(client, make_requests(seed, num_tokens), num_clients)
        storm, streams = FaultStorm(cluster, seed, MORTAL, longest_pause_s), Streams(cluster.addresses, expected, seed)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, streams.end)
        await streams.run(num_clients, num_warm_up_streams, rest_s=rest_s)
        await cluster.check()
        await cluster.take_baseline()
        before = await footprints(cluster)
        begin = time.monotonic()
        await run_beside(storm, streams.run(num_clients, None, begin + minutes * 60, rest_s), streams.report)
        duration_s = time.monotonic() - begin
        await check_end(cluster, streams.report)  # blocks, references, buffers, tasks, keys, descriptors, moves
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
    if '"level": "error"' in line:  # not parsed: who is killed may leave half a line
        print(f"{name}: {line}", file=sys.stderr, flush=True)


def _cpu_s() -> float:
    """Of this process and all that it started, once they have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def footprints(cluster: FaultCluster) -> Mapping[str, Footprint]:
    """Of every process that is never killed."""
    survivors = [process for name, process in cluster.processes.items() if name not in MORTAL]
    return {process.name: await footprint_of(process) for process in survivors}
