"""Keeps the memory of messages that were sent or received for the next ones.

glibc gives blocks of this size back to the system when they are freed, and so each new message would cost a page fault for every
4 KiB: more than all copies of it together.
"""

import ctypes
import sys

KEPT_BYTES = 64 * 1024 * 1024
"""Freed memory at the end of a heap that stays with the process."""
MAX_KEPT_BLOCK_BYTES = 8 * 1024 * 1024
"""Larger blocks are mapped and given back by themselves."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def keep_message_memory() -> None:
    """Once in a process that sends or receives KV. Does nothing where there is no glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAX_KEPT_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
