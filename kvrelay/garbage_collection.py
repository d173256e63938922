"""When Python looks for garbage cycles in a process that serves: not while it starts, and later not in what it started with.

A worker begins with hundreds of thousands of objects that live as long as it does. Going through them takes a tenth of a second,
in which no thread of the process runs Python: every stream would wait for it. So it would for what a gateway keeps of its last
requests, tens of thousands of objects.
"""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable

NEVER = 1_000_000_000
LOOK_INTERVAL_S = 1.0
LONGEST_INTERVAL_S = 300.0
MIN_MINOR_COLLECTIONS = 10
"""Since the last full one: before, there is hardly anything to be found."""


def pause_collection() -> None:
    """Before imports and the model's load, all of which make objects that stay. `keep_what_is_loaded` must follow."""
    gc.disable()


def keep_what_is_loaded() -> None:
    """Once all is loaded: collects what loading left, and from now on looks only at what is made later."""
    gc.collect()
    gc.freeze()
    gc.enable()


@contextlib.asynccontextmanager
async def collecting_when_idle(is_idle: Callable[[], bool]) -> AsyncIterator[None]:
    """Meanwhile full collections are made when nobody waits for the process, and every five minutes if that never happens.

    Args:
        is_idle: whether nothing runs now.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], NEVER)
    collecting = asyncio.create_task(_collect_when_idle(is_idle), name="garbage collection")
    try:
        yield
    finally:
        collecting.cancel()
        await asyncio.wait([collecting])
        gc.set_threshold(*thresholds)


async def _collect_when_idle(is_idle: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    collected_at = loop.time()
    while True:
        await asyncio.sleep(LOOK_INTERVAL_S)
        is_due = is_idle() or loop.time() - collected_at >= LONGEST_INTERVAL_S
        if is_due and gc.get_count()[2] >= MIN_MINOR_COLLECTIONS:
            gc.collect()
            collected_at = loop.time()
