"""Pages of weight files that are mapped into this process: how they are given back. Knows nothing of what lies in them."""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4
# begin-end permissions offset device inode path
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)")
_SUFFIX = ".safetensors"


def give_back_weight_pages() -> int:
    """Gives back the pages of mapped safetensors files: those that are read again come back from the file, the others are free.

    One tensor that is in use keeps its whole file mapped, and what was read of it once would stay in this process's memory.
    Mappings that were written to are left alone. Does nothing but on Linux.

    Returns:
        bytes given back.
    """
    num_bytes = 0
    for begin, end in _clean_mappings():
        # Without a result to check: where the kernel refuses, the pages stay.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
        num_bytes += end - begin
    return num_bytes


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """Address ranges of safetensors files in which no page is this process's own."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
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
