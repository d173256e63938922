"""Sets of CPU cores: how they are written, which this process may use, and how workers on one machine divide them."""

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

CORES_PATTERN = r"^\d+(-\d+)?(,\d+(-\d+)?)*$"


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers in ascending order, from text such as `0-1,3`, which matches CORES_PATTERN."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """Text that `parse_cores` reads."""
    return ",".join(str(core) for core in cores)


def available_cores() -> tuple[int, ...]:
    """Cores that this process may use."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def divide_cores(cores: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """Neighbouring cores for each worker, as evenly as they go; empty ones when there are fewer cores than workers."""
    if len(cores) < num_workers:
        return [()] * num_workers
    ends = [len(cores) * (number + 1) // num_workers for number in range(num_workers)]
    return [tuple(cores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def machine_board_path() -> str:
    """The core board that all of this user's workers on the machine share when nothing else was said."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return str(folder / f"kvrelay-cores-{os.getuid()}")


def pin_this_thread(cores: Iterable[int]) -> bool:
    """Keeps the calling thread, and threads it starts from now on, on these cores.

    Returns:
        False where the system cannot do that or the process may not use these cores; then it runs anywhere.
    """
    if sys.platform != "linux":
        return False
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError):
        return False
    return True
