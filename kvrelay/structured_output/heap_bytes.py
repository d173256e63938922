"""Measures this process's heap, native libraries' parts included."""

import ctypes
from functools import lru_cache
from typing import Any


class _MallocInfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def heap_bytes() -> int | None:
    """None without glibc 2.33."""
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)  # in heaps, and mapped one by one


@lru_cache(1)
def _mallinfo() -> Any:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = _MallocInfo
    return mallinfo
