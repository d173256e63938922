"""Shows the workers of one machine which cores are idle, so that they can borrow them.

All map one file of 64 bytes per core; the first 8 say when its owner last worked there, in
monotonic ns. threads.c writes and reads it. A killed process's cores become idle with time.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

ENTRY_BYTES = 64
NUM_ENTRIES = 1024


class CoreActivityTable:
    """For the cores of all workers that share the file. Raises OSError if it cannot be mapped."""

    def __init__(self, path: Path, cores: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self.num_entries = NUM_ENTRIES
        # Other users may know the path: neither their links nor their files are used.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            os.ftruncate(descriptor, NUM_ENTRIES * ENTRY_BYTES)
            self._memory = mmap.mmap(descriptor, NUM_ENTRIES * ENTRY_BYTES)
        finally:
            os.close(descriptor)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def worked_ns(self, core: int) -> int:  # 0: never
        return int.from_bytes(self._memory[core * ENTRY_BYTES : core * ENTRY_BYTES + 8], "little")
