"""What large messages took goes back to the system when it is freed, also between what is kept."""

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator

import pytest_asyncio

from kvrelay.runtime.freed_memory import GROWN_BYTES, LONGEST_PAUSE, trim_when_grown

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


class Memory:
    """A trim leaves what is in use."""

    def __init__(self) -> None:
        self.size = self.in_use = 100 * MIB
        self.num_looks = self.num_trims = 0

    def resident(self) -> int:
        self.num_looks += 1
        return self.size

    def trim(self) -> None:
        self.num_trims += 1
        self.size = self.in_use

    async def looks(self, number: int) -> None:
        seen = self.num_looks
        while self.num_looks < seen + number:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def memory() -> AsyncIterator[Memory]:
    memory = Memory()
    trimming = asyncio.create_task(trim_when_grown(memory.resident, memory.trim, 0.0))
    yield memory
    trimming.cancel()
    await asyncio.wait([trimming])


async def test_memory_is_trimmed_each_time_that_it_has_grown_and_no_oftener(memory: Memory) -> None:
    for number in range(3):
        await memory.looks(20)
        assert memory.num_trims == number
        memory.size += GROWN_BYTES
    await memory.looks(20)
    assert (memory.num_trims, memory.size) == (3, memory.in_use)
    memory.size += GROWN_BYTES - 1
    await memory.looks(20)
    assert memory.num_trims == 3


async def test_what_a_burst_has_in_use_is_given_back_later_with_few_trims(memory: Memory) -> None:
    memory.size = memory.in_use = memory.in_use + 4 * GROWN_BYTES
    await memory.looks(1000)
    assert 6 < memory.num_trims < 25
    memory.in_use -= 4 * GROWN_BYTES
    await memory.looks(3 * LONGEST_PAUSE)
    assert memory.size == memory.in_use


async def test_another_burst_is_trimmed_at_once_however_rare_trims_have_become(memory: Memory) -> None:
    memory.size = memory.in_use = memory.in_use + 4 * GROWN_BYTES
    await memory.looks(1000)
    memory.size += GROWN_BYTES
    await memory.looks(4)
    assert memory.size == memory.in_use


async def test_memory_is_trimmed_for_as_long_as_that_frees_some(memory: Memory) -> None:
    memory.size, memory.in_use = memory.size + 20 * GROWN_BYTES, memory.in_use + 19 * GROWN_BYTES
    for freed in range(19, 0, -1):
        await memory.looks(4)
        assert memory.size == memory.in_use
        memory.in_use = 100 * MIB + (freed - 1) * GROWN_BYTES
    await memory.looks(4)
    assert memory.size == 100 * MIB
