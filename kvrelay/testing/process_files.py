"""Facts about processes from Linux's /proc."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

_STATE_ESTABLISHED = "01"


def state_of(pid: int) -> str | None:
    """The state letter, such as T (stopped) or Z (zombie); None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def kinds_of_descriptors(pid: int) -> Counter[str]:
    """For people."""
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
    return len(_inodes_of_remote_port(port) & set(_sockets(pid).values()))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def owners_of_local_ports(ports: Collection[int], pids: Iterable[int]) -> dict[int, int]:
    """The process with an established TCP connection from each port; ports of others are left out."""
    port_of_inode = {each[9]: port for each in _established() if (port := _port(each[1])) in ports}
    owners = {}
    for pid in pids:
        owners.update({port_of_inode[inode]: pid for inode in port_of_inode.keys() & set(_sockets(pid).values())})
    return owners


def _inodes_of_remote_port(port: int) -> set[str]:
    return {each[9] for each in _established() if each[2].endswith(f":{port:04X}")}


def _established() -> Iterator[list[str]]:
    """Fields of connections: [1] local address, [2] remote address, [9] inode."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text("utf-8").splitlines()[1:]
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
