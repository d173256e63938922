"""The board on which the workers of one machine note when they last worked on their cores, so that others may borrow idle ones.

A file that all of them map: 64 bytes for each core, in the first 8 a time in nanoseconds of the machine's monotonic clock.
Threads write and read it in threads.c. What a process that was killed has left there is only a time, which passes.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

ENTRY_BYTES = 64
NUM_ENTRIES = 1024


class CoreBoard:
    """A mapped board.

    Args:
        path: of the file; made when missing.
        cores: that may be borrowed while idle: those of all workers that share the board.

    Raises:
        OSError: the file cannot be made or mapped.
    """

    def __init__(self, path: Path, cores: Sequence[int]) -> None:
        self.cores = tuple(cores)
        self.num_entries = NUM_ENTRIES
        # The name may be known to others: a link that somebody laid there is not followed, nor is their file used.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            os.ftruncate(descriptor, NUM_ENTRIES * ENTRY_BYTES)
            self._memory = mmap.mmap(descriptor, NUM_ENTRIES * ENTRY_BYTES)
        finally:
            os.close(descriptor)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def worked_ns(self, core: int) -> int:
        """When the core's owner last worked there, by the machine's monotonic clock; 0: never."""
        return int.from_bytes(self._memory[core * ENTRY_BYTES : core * ENTRY_BYTES + 8], "little")
