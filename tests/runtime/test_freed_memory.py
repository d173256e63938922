"""What large messages took goes back to the system when it is freed, also between what is kept."""

import subprocess
import sys
import textwrap

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
