"""Which CPU cores this process may use, and how workers of one machine divide them."""

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvrelay.runtime.cache_folder import is_private, temporary_folder
from kvrelay.runtime.cpu_quota import cpu_quota

CORES_PATTERN = r"^\d+(-\d+)?(,\d+(-\d+)?)*$"


def parse_cores(text: str) -> tuple[int, ...]:
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    return ",".join(str(core) for core in cores)


def available_cores() -> tuple[int, ...]:
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class ProcessorShare:
    cores: tuple[int, ...]
    quota: float | None
    """Set when below the number of cores. Threads are then not pinned: other containers share the
    cores.
    """

    @property
    def num_threads(self) -> int:
        """Rounds a quota down: threads of a step wait for each other, and all pause once it is used
        up.
        """
        return len(self.cores) if self.quota is None else max(1, int(self.quota))


def processor_share(root: Path = Path("/")) -> ProcessorShare:
    cores = available_cores()
    quota = cpu_quota(root)
    return ProcessorShare(cores, None if quota is None or quota >= len(cores) else quota)


def divide_cores(cores: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """Gives each worker neighbouring cores, or none if there are too few."""
    if len(cores) < num_workers:
        return [()] * num_workers
    ends = [len(cores) * (number + 1) // num_workers for number in range(num_workers)]
    return [tuple(cores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


def default_core_sharing_file() -> str | None:
    """Returns None when no folder is writable, or the file is another user's."""
    folders = (Path("/dev/shm"), temporary_folder())  # noqa: S108  # asks for its size only
    folder = next((each for each in folders if each is not None and os.access(each, os.W_OK | os.X_OK)), None)
    if folder is None:
        return None
    path = folder / f"kvrelay-cores-{os.getuid()}"
    return None if os.path.lexists(path) and not is_private(path) else str(path)


def pin_this_thread(cores: Iterable[int]) -> bool:
    """Pins threads started later too. Returns False where this is not allowed."""
    if sys.platform != "linux":
        return False
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError):
        return False
    return True
