"""Detection of lost workers."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.process import FaultProcess
from kvrelay.testing.waiting import wait_until

Harm = Callable[[FaultProcess], Awaitable[None]]


async def detection(num_rounds: int = 10) -> dict[str, Any]:
    """Milliseconds from the loss of a worker, by kind, until its gateway has no session with it."""
    times_ms: dict[str, list[float]] = {kind: [] for kind in HARMS}
    async with FaultCluster() as cluster, cluster.client() as client:
        for _ in range(num_rounds):
            for kind in HARMS:
                for name in ("prefill-0", "decode-0"):
                    times_ms[kind].append(await detect(cluster, client, kind, cluster[name]))
        await cluster.check()
    figures: dict[str, Any] = {"losses": sum(len(times) for times in times_ms.values())}
    for kind, times in times_ms.items():
        figures |= {
            f"{kind}_median_ms": round(sorted(times)[len(times) // 2], 1),
            f"{kind}_worst_ms": round(max(times), 1),
        }
    return figures


async def detect(cluster: FaultCluster, client: AsyncClient, kind: str, victim: FaultProcess) -> float:
    """Causes one loss and repairs it; milliseconds until it was noticed."""

    async def is_gone() -> bool:
        return victim.name not in await cluster.connected_workers(client)

    assert not await is_gone()
    began_at = time.monotonic()
    await HARMS[kind](victim)
    await wait_until(is_gone, f"{victim.name} is missed", 30.0)
    noticed_ms = (time.monotonic() - began_at) * 1000
    cluster.heal()
    if victim.state == "T":
        await victim.resume()
    await cluster.restart_ended()
    return noticed_ms


async def _kill(victim: FaultProcess) -> None:
    await victim.kill()


async def _stop(victim: FaultProcess) -> None:
    await victim.stop()


async def _deafen(victim: FaultProcess) -> None:
    victim.link_from("gateway").to_target.hold()


async def _mute(victim: FaultProcess) -> None:
    victim.link_from("gateway").to_source.hold()


async def _part(victim: FaultProcess) -> None:
    victim.link_from("gateway").blackhole()


HARMS: dict[str, Harm] = {
    "killed": _kill,
    "stopped": _stop,
    "hears_nothing": _deafen,
    "not_heard": _mute,
    "parted": _part,
}
"""By their name in the figures."""
