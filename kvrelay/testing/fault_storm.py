"""Random faults on a cluster under load, one after the other. Each proves that it happened.

A seed draws the same faults. What they hit depends on time.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvrelay.runtime.fault_points import FaultAction
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
    "prefill": ("prefill.job_received", "prefill.layer_written", "prefill.chunk_sent", "prefill.transfer_acknowledged"),
    "decode": ("decode.blocks_reserved", "decode.chunk_written", "decode.step_begins", "decode.tokens_reported"),
}


@dataclass(slots=True)
class FaultStorm:
    """Faults for a cluster with at least two processes of each kind. None `mortal`: all may be
    killed.
    """

    cluster: FaultCluster
    seed: int
    mortal: frozenset[str] | None = None
    longest_pause_s: float = LONGEST_PAUSE_S
    fired: Counter[str] = field(default_factory=Counter)
    """By kind."""
    missed: Counter[str] = field(default_factory=Counter)
    """Faults that hit nothing, by kind."""
    _generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._generator = random.Random(self.seed)

    async def run(self) -> None:
        """Strikes until it is cancelled; heal the cluster then."""
        while True:
            for kind in self._generator.sample(list(KINDS), len(KINDS)):
                await self.strike(kind)
                await asyncio.sleep(self._generator.uniform(0.0, self.longest_pause_s))

    async def strike(self, kind: str) -> bool:
        """Causes one fault, then makes the cluster whole; whether it happened."""
        happened = await KINDS[kind](self)
        (self.fired if happened else self.missed)[kind] += 1
        await self.make_whole()
        return happened

    async def make_whole(self) -> None:
        """Heals, resumes and restarts all, and waits until all are connected."""
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

    # --- processes --------------------------------------------------------------------------------

    async def kill_worker(self) -> bool:
        victim = self._draw(self._generator.choice(["prefill", "decode"]), mortal=True)
        await victim.kill()
        return not victim.is_running

    async def kill_worker_at_a_step(self) -> bool:
        role = self._generator.choice(list(LETHAL_POINTS))
        point, victim = self._generator.choice(LETHAL_POINTS[role]), self._draw(role, mortal=True)
        fault = victim.arm(point, FaultAction.KILL, at=self._generator.randint(1, 20))
        if not await _happens(lambda: fault.num_fired > 0):
            return False
        await victim.wait_until_gone()
        return True

    async def kill_gateway(self) -> bool:
        victim = self._draw("gateway", mortal=True)
        await victim.kill()
        return not victim.is_running

    async def stop_worker(self) -> bool:
        """Stops a worker beyond its liveness window: it comes back as a zombie."""
        return await _stop(self._draw_worker(), BEYOND_WINDOW_S)

    async def stall_worker(self) -> bool:
        """Stops a worker for less than its liveness window."""
        return await _stop(self._draw_worker(), WITHIN_WINDOW_S)

    # --- links ------------------------------------------------------------------------------------

    async def lose_session(self) -> bool:
        link = self._draw_worker().link_from(self._draw("gateway").name)
        direction = self._generator.choice([link.to_target, link.to_source])
        before = direction.count("hold")
        direction.hold()
        await asyncio.sleep(BEYOND_WINDOW_S)
        return direction.count("hold") > before

    async def reset_session(self) -> bool:
        return self._draw_worker().link_from(self._draw("gateway").name).close() > 0

    async def lose_pair(self) -> bool:
        link = self._draw_pair()
        before = link.to_target.count("hold")
        link.blackhole()
        await asyncio.sleep(PAIR_LOST_S)
        return link.to_target.count("hold") > before

    async def cut_push(self) -> bool:
        direction = self._draw_pair().to_target
        before = direction.count("cut")
        direction.cut_at(self._generator.randrange(200_000))
        return await _happens(lambda: direction.count("cut") > before)

    async def flip_push(self) -> bool:
        direction = self._draw_pair().to_target
        before = direction.count("flip")
        direction.flip_at(self._generator.randrange(200_000))
        return await _happens(lambda: direction.count("flip") > before)

    async def slow_push(self) -> bool:
        direction = self._draw_pair().to_target
        before, direction.latency_s = direction.num_bytes, self._generator.uniform(0.01, 0.1)
        return await _happens(lambda: direction.num_bytes > before)

    def _draw_pair(self) -> Link:
        return self._draw("decode").link_from(self._draw("prefill").name)

    # --- Redis ------------------------------------------------------------------------------------

    async def stop_redis(self) -> bool:
        pid = self.cluster.valkey.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await wait_until(lambda: state_of(pid) == "T", "Valkey is stopped")
            await asyncio.sleep(self._generator.uniform(0.5, 3.0))
        finally:
            os.kill(pid, signal.SIGCONT)
        return True

    async def reset_redis(self) -> bool:
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
"""By name in the figures."""


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
