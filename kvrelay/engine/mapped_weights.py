"""The weight files that a model maps: the types they hold, and their pages in memory."""

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MADV_DONTNEED = 4
# begin-end permissions offset device inode path
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)")
_SUFFIX = ".safetensors"
_MAX_HEADER_BYTES = 100_000_000
READ_BYTES = 64 * 1024 * 1024  # after which pages are released while a model is loaded


def stored_dtypes(folder: Path) -> set[str]:
    """As a folder's safetensors files name them; empty where one is broken."""
    dtypes: set[str] = set()
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            with path.open("rb") as file:
                num_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(num_bytes, _MAX_HEADER_BYTES)))
            dtypes |= {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return set()  # loading says what is wrong
    return dtypes


class PagesInUse:
    """Releases pages each time that READ_BYTES of weights were read."""

    def __init__(self) -> None:
        self._num_read = 0

    def count(self, num_bytes: int) -> None:
        self._num_read += num_bytes
        if self._num_read >= READ_BYTES:
            release_weight_pages()
            self._num_read = 0


pages_in_use = PagesInUse()  # one, because a release is of all pages


@contextmanager
def few_pages_in_use(module: Any) -> Iterator[None]:
    """Releases pages during forwards."""

    def count(part: Any, _inputs: Any, _output: Any) -> None:
        pages_in_use.count(sum(tensor.nbytes for tensor in part.parameters(recurse=False)))

    handles = [part.register_forward_hook(count) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
