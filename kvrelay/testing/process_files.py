"""What the kernel says of a process, read from /proc; Linux only. Knows nothing of what the processes are."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_STATE_ESTABLISHED = "01"


def state_of(pid: int) -> str | None:
    """The process's state letter: T when it is stopped, Z when it is dead and not waited for; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def num_descriptors(pid: int) -> int:
    """Open files and sockets."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Memory that the process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def owner_of_local_port(port: int, pids: Iterable[int]) -> int | None:
    """Which of the processes has an established TCP connection from this port."""
    inodes = _inodes_of_local_port(port)
    for pid in pids:
        if inodes & set(_sockets(pid).values()):
            return pid
    return None


def _inodes_of_local_port(port: int) -> set[str]:
    wanted, inodes = f":{port:04X}", set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        fields = (line.split() for line in lines if wanted in line)
        inodes |= {each[9] for each in fields if each[1].endswith(wanted) and each[3] == _STATE_ESTABLISHED}
    return inodes


def _sockets(pid: int) -> Mapping[str, str]:
    """Descriptor to inode."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, PermissionError):
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            found[name] = target[8:-1]
    return found
