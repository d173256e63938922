"""Gives the memory of freed messages back to the system.

glibc keeps it in an arena for each thread: after a burst of large messages a process stays large.
"""

import ctypes
import sys

MAPPED_BYTES = 256 * 1024
"""Larger blocks are mapped one by one, and unmapped when they are freed."""
KEPT_BYTES = 1024 * 1024
"""At the end of a heap."""
NUM_ARENAS = 2

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def give_back_freed_memory() -> None:
    """Once, before threads start. No effect without glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_ARENA_MAX, NUM_ARENAS)
