"""What the kernel says of a process, read from /proc; Linux only. Knows nothing of what the processes are."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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


def kinds_of_descriptors(pid: int) -> Counter[str]:
    """What is open, for people: pipes, files, and established TCP connections by both their ports."""
    ports = {each[9]: f"tcp {_port(each[1])} to {_port(each[2])}" for each in _established()}
    kinds: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue  # closed meanwhile
        kind, _, inode = target.partition(":")
        kinds[ports.get(inode.strip("[]"), kind)] += 1
    return kinds


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def num_connections_to(pid: int, port: int) -> int:
    """Established TCP connections of the process to this port of any host."""
    return len(_inodes_of_remote_port(port) & set(_sockets(pid).values()))


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
    return {each[9] for each in _established() if each[1].endswith(f":{port:04X}")}


def _inodes_of_remote_port(port: int) -> set[str]:
    return {each[9] for each in _established() if each[2].endswith(f":{port:04X}")}


def _established() -> Iterator[list[str]]:
    """Fields of every established TCP connection's line; local address second, remote address third, inode tenth."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        yield from (fields for fields in map(str.split, lines) if fields[3] == _STATE_ESTABLISHED)


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
