"""A time limit that ignores the time for which this process itself stood still."""

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
