"""How long an event loop lets others wait, by the processor time of its own process.

due |---- other processes ran ----|==== this one ran ====| tick
                                   counts
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

TICK_S = 0.02


class LoopDelay:
    """`observe` gets how late each tick was, in seconds."""

    def __init__(self, observe: Callable[[float], None], cpu_clock: Callable[[], float] = time.process_time) -> None:
        self._observe = observe
        self._cpu_clock = cpu_clock
        self._loop = asyncio.get_running_loop()
        self._plan()

    def stop(self) -> None:
        self._timer.cancel()

    def _plan(self) -> None:
        self._cpu_s = self._cpu_clock()
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late_s = self._loop.time() - self._due
        self._observe(max(0.0, min(late_s, self._cpu_clock() - self._cpu_s)))
        self._plan()


@contextlib.asynccontextmanager
async def measuring_delay(observe: Callable[[float], None]) -> AsyncIterator[None]:
    delay = LoopDelay(observe)
    try:
        yield
    finally:
        delay.stop()
