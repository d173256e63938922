"""Keeps the memory of freed messages in the process.

glibc returns blocks of this size to the system, and page faults cost more than all copies.
"""

import ctypes
import sys

KEPT_BYTES = 64 * 1024 * 1024  # at the end of a heap
MAX_KEPT_BLOCK_BYTES = 8 * 1024 * 1024  # larger blocks are mapped one by one

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_message_memory() -> None:
    """Once in a process that transfers KV. No effect without glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAX_KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
