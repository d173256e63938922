"""Times that leave out those for which this process itself stood still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

NUM_TICKS = 10


@asynccontextmanager
async def own_time_limit(limit_s: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`, but a late event loop still reads an answer that came in time.

    Each tick counts once, however late the loop reaches it.
    """
    loop = asyncio.get_running_loop()
    tick_s = limit_s / NUM_TICKS
    num_left = NUM_TICKS
    timer: asyncio.TimerHandle | None = None

    def tick() -> None:
        nonlocal num_left, timer
        num_left -= 1
        if num_left > 0:
            timer = loop.call_later(tick_s, tick)
        else:
            # It ends in the next turn of the loop, after what has arrived in this one.
            limit.reschedule(loop.time())

    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(tick_s, tick)
        try:
            yield
        finally:
            timer.cancel()


class TurnClock:
    """How long an engine's turn lasts, less the time for which its whole process stood still.

    It is looked at every `interval_s`. By how much a look is late, nothing in the process ran.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_look: float | None = None
        self._last_turn_s = 0.0
        self._stood_still_s = 0.0

    def look(self, turn_s: float, now: float) -> float:
        """Returns the turn's own seconds; `turn_s` are those since it began."""
        if turn_s < self._last_turn_s:
            self._stood_still_s = 0.0
        elif self._last_look is not None:
            self._stood_still_s += max(0.0, now - self._last_look - self._interval_s)
        self._last_turn_s, self._last_look = turn_s, now
        return max(0.0, turn_s - self._stood_still_s)
