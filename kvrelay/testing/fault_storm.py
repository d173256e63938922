"""Faults that a seed draws, one after the other, on a cluster under load; each proves that it happened.

The same seed draws the same faults of the same processes in the same order. What they meet differs from run to run, as time does.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvrelay.fault_points import FaultAction
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.process import FaultProcess
from kvrelay.testing.process_files import state_of
from kvrelay.testing.proxy import Link
from kvrelay.testing.waiting import wait_until

BEYOND_WINDOW_S = 2.5
WITHIN_WINDOW_S = 0.6
PAIR_LOST_S = 4.0
FIRE_TIMEOUT_S = 5.0
LONGEST_PAUSE_S = 1.0
LETHAL_POINTS = {
    "prefill": ("prefill.work_received", "prefill.layer_written", "prefill.chunk_sent", "prefill.transfer_acknowledged"),
    "decode": ("decode.blocks_reserved", "decode.chunk_written", "decode.step_begins", "decode.tokens_reported"),
}


@dataclass(slots=True)
class FaultStorm:
    """Faults for a cluster of at least two of each kind.

    Args:
        cluster: under load, or most faults find nothing to hit.
        seed: of what is drawn.
        mortal: names of processes that may be killed; the others are only stopped and cut off. None: all.
        longest_pause_s: between two faults, drawn from 0 on.
    """

    cluster: FaultCluster
    seed: int
    mortal: frozenset[str] | None = None
    longest_pause_s: float = LONGEST_PAUSE_S
    fired: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault happened."""
    missed: Counter[str] = field(default_factory=Counter)
    """How often each kind was tried and found nothing to hit."""
    _generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._generator = random.Random(self.seed)

    async def run(self) -> None:
        """One fault after the other, for ever; cancel it to stop, and heal the cluster then."""
        while True:
            for kind in self._generator.sample(list(KINDS), len(KINDS)):
                await self.strike(kind)
                await asyncio.sleep(self._generator.uniform(0.0, self.longest_pause_s))

    async def strike(self, kind: str) -> bool:
        """Lets one fault of a kind happen and makes the cluster whole again; whether it happened."""
        happened = await KINDS[kind](self)
        (self.fired if happened else self.missed)[kind] += 1
        await self.make_whole()
        return happened

    async def make_whole(self) -> None:
        """Heals all links, continues what is stopped, starts what has ended, and waits until all know each other."""
        self.cluster.heal()
        for process in self.cluster.processes.values():
            if process.state == "T":
                await process.resume()
        await self.cluster.restart_ended()

    def _draw(self, role: str, *, mortal: bool = False) -> FaultProcess:
        candidates = self.cluster.of_role(role)
        if mortal and self.mortal is not None:
            candidates = [process for process in candidates if process.name in self.mortal]
        return self._generator.choice(candidates)

    def _draw_worker(self) -> FaultProcess:
        return self._draw(self._generator.choice(["prefill", "decode"]))

    # --- processes ------------------------------------------------------------------------------------------------------------

    async def kill_worker(self) -> bool:
        """At any moment."""
        victim = self._draw(self._generator.choice(["prefill", "decode"]), mortal=True)
        await victim.kill()
        return not victim.is_running

    async def kill_worker_at_a_step(self) -> bool:
        """At a named step of whatever it does."""
        role = self._generator.choice(list(LETHAL_POINTS))
        point, victim = self._generator.choice(LETHAL_POINTS[role]), self._draw(role, mortal=True)
        fault = victim.arm(point, FaultAction.KILL, at=self._generator.randint(1, 20))
        if not await _happens(lambda: fault.num_fired > 0):
            return False
        await victim.wait_until_gone()
        return True

    async def kill_gateway(self) -> bool:
        """Its resumable requests go on at another."""
        victim = self._draw("gateway", mortal=True)
        await victim.kill()
        return not victim.is_running

    async def stop_worker(self) -> bool:
        """For longer than its window: it comes back as a zombie."""
        return await _stop(self._draw_worker(), BEYOND_WINDOW_S)

    async def stall_worker(self) -> bool:
        """For less than its window."""
        return await _stop(self._draw_worker(), WITHIN_WINDOW_S)

    # --- links ----------------------------------------------------------------------------------------------------------------

    async def lose_session(self) -> bool:
        """A gateway and a worker cannot hear each other, in one direction."""
        link = self._draw_worker().link_from(self._draw("gateway").name)
        direction = self._generator.choice([link.to_target, link.to_source])
        before = direction.count("hold")
        direction.hold()
        await asyncio.sleep(BEYOND_WINDOW_S)
        return direction.count("hold") > before

    async def reset_session(self) -> bool:
        """The connections between a gateway and a worker are reset."""
        return self._draw_worker().link_from(self._draw("gateway").name).close() > 0

    async def lose_pair(self) -> bool:
        """A prefill and a decode worker cannot reach each other, and are both alive."""
        link = self._draw_pair()
        before = link.to_target.count("hold")
        link.blackhole()
        await asyncio.sleep(PAIR_LOST_S)
        return link.to_target.count("hold") > before

    async def cut_push(self) -> bool:
        """The connection of pushes is cut at any byte."""
        direction = self._draw_pair().to_target
        before = direction.count("cut")
        direction.cut_at(self._generator.randrange(200_000))
        return await _happens(lambda: direction.count("cut") > before)

    async def flip_push(self) -> bool:
        """A bit of what is pushed is flipped."""
        direction = self._draw_pair().to_target
        before = direction.count("flip")
        direction.flip_at(self._generator.randrange(200_000))
        return await _happens(lambda: direction.count("flip") > before)

    async def slow_push(self) -> bool:
        """The link of pushes has latency."""
        direction = self._draw_pair().to_target
        before, direction.latency_s = direction.num_bytes, self._generator.uniform(0.01, 0.1)
        return await _happens(lambda: direction.num_bytes > before)

    def _draw_pair(self) -> Link:
        return self._draw("decode").link_from(self._draw("prefill").name)

    # --- Redis ----------------------------------------------------------------------------------------------------------------

    async def stop_redis(self) -> bool:
        """The server stands still."""
        pid = self.cluster.valkey.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait_until(lambda: state_of(pid) == "T", "Valkey is stopped")
            await asyncio.sleep(self._generator.uniform(0.5, 3.0))
        finally:
            os.kill(pid, signal.SIGCONT)
        return True

    async def reset_redis(self) -> bool:
        """All connections to it are reset."""
        return sum(link.close() for link in self.cluster.valkey_proxy.links()) > 0


KINDS: dict[str, Callable[[FaultStorm], Awaitable[bool]]] = {
    "kill worker": FaultStorm.kill_worker,
    "kill worker at a step": FaultStorm.kill_worker_at_a_step,
    "kill gateway": FaultStorm.kill_gateway,
    "stop worker": FaultStorm.stop_worker,
    "stall worker": FaultStorm.stall_worker,
    "lose session": FaultStorm.lose_session,
    "reset session": FaultStorm.reset_session,
    "lose pair": FaultStorm.lose_pair,
    "cut push": FaultStorm.cut_push,
    "flip push": FaultStorm.flip_push,
    "slow push": FaultStorm.slow_push,
    "stop redis": FaultStorm.stop_redis,
    "reset redis": FaultStorm.reset_redis,
}
"""All kinds of faults, by the name under which they are counted."""


async def _stop(victim: FaultProcess, seconds: float) -> bool:
    await victim.stop()
    await asyncio.sleep(seconds)
    was_stopped = victim.state == "T"
    await victim.resume()
    return was_stopped


async def _happens(condition: Callable[[], bool]) -> bool:
    try:
        await wait_until(condition, "it happens", FIRE_TIMEOUT_S)
    except AssertionError:
        return False
    return True
