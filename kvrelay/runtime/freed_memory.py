"""Gives the memory of freed messages back to the system.

glibc keeps it in arenas, so that a process stays large after a burst.
"""

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

MAPPED_BYTES = 256 * 1024
"""Larger blocks are mapped one by one, and unmapped when they are freed."""
KEPT_BYTES = 1024 * 1024
"""At the end of a heap."""
NUM_ARENAS = 2
LOOK_INTERVAL_S = 1.0
GROWN_BYTES = 8 * 1024 * 1024
"""Since it was smallest; a trim takes milliseconds."""
FREED_BYTES = 1024 * 1024
"""By a trim that is worth another."""
LONGEST_PAUSE = 63
"""Looks without a trim."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def give_back_freed_memory() -> None:
    """Once, before threads start. No effect without glibc."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_ARENA_MAX, NUM_ARENAS)


@contextlib.asynccontextmanager
async def trimming_memory() -> AsyncIterator[None]:
    """Gives small blocks back too, between others that are in use, after the process has grown."""
    trim = _of_libc("malloc_trim")
    if trim is None:
        yield
        return
    trimming = asyncio.create_task(trim_when_grown(resident_bytes, lambda: trim(0)), name="trim of freed memory")
    try:
        yield
    finally:
        trimming.cancel()
        await asyncio.wait([trimming])


async def trim_when_grown(
    resident: Callable[[], int], trim: Callable[[], object], interval_s: float = LOOK_INTERVAL_S
) -> None:
    """Ever more rarely where that frees little: what has grown may still be in use."""
    least = last = resident()
    num_looks = pause = 0
    while True:
        await asyncio.sleep(interval_s)
        size, num_looks = resident(), num_looks + 1
        least, has_burst, last = min(least, size), size - last >= GROWN_BYTES, size
        if size - least < GROWN_BYTES:
            pause = 0
        elif has_burst or num_looks > pause:
            await asyncio.to_thread(trim)  # without the GIL
            last, num_looks = resident(), 0
            pause = 0 if size - last >= FREED_BYTES else min(2 * pause + 1, LONGEST_PAUSE)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _of_libc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function
