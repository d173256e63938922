"""What counts as the event loop's own delay: time in which its process ran, and no other."""

import asyncio
import time
from collections.abc import Callable

import pytest

from kvrelay.runtime.loop_delay import TICK_S, LoopDelay

STALL_S = 0.3


class Ticks:
    """Delays as they are observed."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self._arrived = asyncio.Event()

    def observe(self, delay_s: float) -> None:
        self.delays.append(delay_s)
        self._arrived.set()

    async def after(self, stall: Callable[[], None]) -> float:
        """The longest delay of a tick that came during or after the stall."""
        num_before = len(self.delays)
        stall()
        self._arrived.clear()
        async with asyncio.timeout(60):
            await self._arrived.wait()
        return max(self.delays[num_before:])


def compute() -> None:
    end = time.process_time() + STALL_S
    while time.process_time() < end:
        pass


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


async def test_a_callback_that_computes_is_a_delay(ticks: Ticks) -> None:
    delay = LoopDelay(ticks.observe)
    assert await ticks.after(compute) >= STALL_S - 2 * TICK_S
    delay.stop()


async def test_a_wait_without_the_processor_is_none(ticks: Ticks) -> None:
    # as of a process whose cores are with others
    delay = LoopDelay(ticks.observe, cpu_clock=lambda: 1.0)
    assert await ticks.after(lambda: time.sleep(STALL_S)) == 0.0
    delay.stop()


async def test_no_tick_comes_after_the_end(ticks: Ticks) -> None:
    delay = LoopDelay(ticks.observe)
    delay.stop()
    beside = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(2 * TICK_S, beside.set_result, None)
    await beside
    assert ticks.delays == []
