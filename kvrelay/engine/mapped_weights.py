"""Releases the pages of mapped weight files."""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4
# begin-end permissions offset device inode path
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)")
_SUFFIX = ".safetensors"


def release_weight_pages() -> int:
    """Returns the released bytes; the kernel reads needed pages again.

    A tensor in use keeps its whole file in memory.
    """
    num_bytes = 0
    for begin, end in _clean_mappings():
        # Result unchecked: if the kernel refuses, the pages stay.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
        num_bytes += end - begin
    return num_bytes


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """Address ranges that were not written to."""
    try:
        lines = Path("/proc/self/smaps").read_text("utf-8").splitlines()
    except OSError:
        return
    mapping: tuple[int, int] | None = None
    for line in lines:
        if found := _MAPPING.fullmatch(line):
            mapping = (int(found[1], 16), int(found[2], 16)) if found[3].endswith(_SUFFIX) else None
        elif line.startswith("Anonymous:") and mapping is not None:
            if line.split()[1] == "0":
                yield mapping
            mapping = None
