"""This process's share of processor time: the least quota of its control group and parents.

cgroup v2    /proc/self/cgroup  0::/a/b              group /a/b
             <mount>/a/b/cpu.max  "150000 100000"    or "max 100000" for none
cgroup v1    /proc/self/cgroup  4:cpu,cpuacct:/a     group /a
             <mount>/a/cpu.cfs_quota_us  150000      or -1 for none; cpu.cfs_period_us
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_OCTAL = re.compile(r"\\([0-7]{3})")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns processors, such as 1.5, or None without a limit. Tests set `root`."""
    if sys.platform != "linux":
        return None
    quotas = [quota for folder in _folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _folders(root: Path) -> Iterator[Path]:
    groups = dict(_groups(root))
    for version, mount_root, mount_point in _mounts(root):
        if version not in groups:
            continue
        group = PurePosixPath(groups[version])
        # In a container the path may be the host's, outside of the mount.
        below = group.relative_to(mount_root) if group.is_relative_to(mount_root) else PurePosixPath()
        folder = PurePosixPath(mount_point, *(part for part in below.parts if part != ".."))
        while True:
            yield root / folder.relative_to("/")
            if folder == PurePosixPath(mount_point) or folder == folder.parent:
                break
            folder = folder.parent


def _groups(root: Path) -> Iterator[tuple[int, str]]:
    """Yields (cgroup version, path of the process)."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """Yields (cgroup version, mounted part, mount point)."""
    for line in _lines(root / "proc/self/mountinfo"):
        # 33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
        place, _, kind = line.partition(" - ")
        places, kinds = place.split(), kind.split()
        if len(places) < 5 or len(kinds) < 3:
            continue
        mount_root, mount_point = _unescaped(places[3]), _unescaped(places[4])
        if kinds[0] == "cgroup2":
            yield 2, mount_root, mount_point
        elif kinds[0] == "cgroup" and "cpu" in kinds[2].split(","):
            yield 1, mount_root, mount_point


def _quota_of(folder: Path) -> float | None:
    if (words := _words(folder / "cpu.max")) is not None:
        return _ratio(words[0], words[1]) if len(words) == 2 else None
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return _ratio(quota[0], period[0]) if quota and period else None


def _ratio(quota_us: str, period_us: str) -> float | None:
    if not quota_us.isdecimal() or not period_us.isdecimal() or int(quota_us) == 0 or int(period_us) == 0:
        return None  # "max", -1
    return int(quota_us) / int(period_us)


def _words(path: Path) -> list[str] | None:
    try:
        return path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    r"""mountinfo writes blanks as \040."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), path)
