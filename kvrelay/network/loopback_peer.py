"""Whose process is at the other end of a loopback connection."""

import os
import socket
import sys
from pathlib import Path

from kvrelay.network.own_address import LOOPBACK

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_MAPPED = f"{0:016X}{int.from_bytes(bytes(2) + bytes([255, 255]), sys.byteorder):08X}"
"""Before an IPv4 address of an IPv6 socket."""
_USER_COLUMN = 7


def is_of_this_user(peer: str, own_port: int) -> bool:
    """True also where the system does not tell, as outside Linux."""
    host, _, port = peer.removeprefix("ipv4:").rpartition(":")
    if host != LOOPBACK or not port.isdecimal():
        return False
    tables = [table.read_text("ascii") for table in _TABLES if table.exists()]
    if not tables:
        return True
    address = f"{int.from_bytes(socket.inet_aton(LOOPBACK), sys.byteorder):08X}"
    ends = [f" {prefix}{address}:{int(port):04X} {prefix}{address}:{own_port:04X} " for prefix in ("", _MAPPED)]
    lines = (line for table in tables for line in table.splitlines())
    found = next((line for line in lines if any(each in line for each in ends)), "")
    return found != "" and int(found.split()[_USER_COLUMN]) == os.geteuid()
