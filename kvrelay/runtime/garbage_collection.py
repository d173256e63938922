"""When a serving process collects garbage cycles: not at start, and never among what it started
with.

A full collection of a worker's objects takes 0.1 s, in which every stream waits.
"""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable

NEVER = 1_000_000_000
LOOK_INTERVAL_S = 1.0
LONGEST_INTERVAL_S = 300.0
MIN_MINOR_COLLECTIONS = 10
"""There is hardly any garbage sooner after a full collection."""


def pause_collection() -> None:
    """Call before imports and the model's load; `keep_what_is_loaded` must follow."""
    gc.disable()


def keep_what_is_loaded() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@contextlib.asynccontextmanager
async def collecting_when_idle(is_idle: Callable[[], bool]) -> AsyncIterator[None]:
    """Full collections run while `is_idle`, or after five minutes."""
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
