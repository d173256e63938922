"""What a process has in memory, and what it keeps of a burst."""

import asyncio
import contextlib
import os
from pathlib import Path

MAX_GROWN_BYTES = 32 * 2**20
"""That a gateway may keep of what was refused."""
SETTLE_TIMEOUT_S = 10.0


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def growth_at_rest(pid: int, memory: int, timeout_s: float = SETTLE_TIMEOUT_S) -> int:
    """What the process has more than `memory` bytes, once it has collected what it can."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while memory_of(pid) - memory >= MAX_GROWN_BYTES:  # noqa: ASYNC110 - another process collects
                await asyncio.sleep(0.1)
    return memory_of(pid) - memory
