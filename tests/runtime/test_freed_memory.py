"""What large messages took goes back to the system when it is freed, also between what is kept."""

import asyncio
import subprocess
import sys
import textwrap

import pytest

from kvrelay.runtime.freed_memory import GROWN_BYTES, trim_when_grown

MIB = 2**20
NUM_BLOCKS = 64

_PROCESS = textwrap.dedent("""
    import os, pathlib, sys
    from kvrelay.runtime.freed_memory import give_back_freed_memory

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if sys.argv[1] == "give back":
        give_back_freed_memory()
    first = b"x" * (2 << 20)
    del first  # glibc keeps blocks of this size from now on
    before, blocks, kept = resident(), [], []
    for _ in range(int(sys.argv[2])):
        blocks.append(b"x" * (1 << 20))
        kept.append(b"y" * (64 << 10))
    del blocks
    print(resident() - before - len(kept) * len(kept[0]))
""")


def kept_bytes(how: str) -> int:
    command = [sys.executable, "-c", _PROCESS, how, str(NUM_BLOCKS)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_messages_leave_the_process() -> None:
    assert kept_bytes("give back") < 4 * MIB
    assert kept_bytes("as the library does") > NUM_BLOCKS * MIB // 2, "else there is nothing to give back"


@pytest.mark.asyncio
async def test_memory_is_trimmed_each_time_that_it_has_grown() -> None:
    size, num_looks, num_trims = 100 * MIB, 0, 0

    def resident() -> int:
        nonlocal num_looks
        num_looks += 1
        return size

    def trim() -> None:
        nonlocal size, num_trims
        size -= GROWN_BYTES // 4
        num_trims += 1

    async def looked_again() -> None:
        """Often enough for two trims."""
        seen = num_looks
        while num_looks < seen + 10:  # noqa: ASYNC110
            await asyncio.sleep(0)

    trimming = asyncio.create_task(trim_when_grown(resident, trim, 0.0))
    for expected in (1, 2, 3):
        await looked_again()
        assert num_trims == 2 * (expected - 1), "not before it has grown"
        size += GROWN_BYTES
        await looked_again()
        assert num_trims == 2 * expected, "and once more, for what was still in use"
    size -= MIB
    await looked_again()
    assert num_trims == 6
    trimming.cancel()
    await asyncio.wait([trimming])
