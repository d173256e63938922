"""Memory that two processes of one host share for KV payloads.

A region is an anonymous file (memfd): no other process can open it, and it vanishes with both.
Its size is sealed, so that neither side can make the other fault. Only the prefill worker writes.
"""

import fcntl
import mmap
import os
import secrets
import socket
import struct
import sys
from dataclasses import dataclass, field

from kvrelay.errors import TransferError

REGION_ID_BYTES = 16
MAX_REGION_BYTES = 64 * 1024 * 1024
MAX_REGIONS = 8  # per connection, so pushes at a time

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
_PEER_CREDENTIALS = struct.Struct("3i")  # process, user, group


def is_supported() -> bool:  # memfd with seals, and abstract sockets
    return sys.platform == "linux" and hasattr(os, "memfd_create")


@dataclass(eq=False)
class SharedRegion:
    """Both sides have mapped it."""

    region_id: bytes
    memory: mmap.mmap
    buffer: memoryview = field(init=False)  # writable on the sender's side

    def __post_init__(self) -> None:
        self.buffer = memoryview(self.memory)

    @property
    def num_bytes(self) -> int:
        return len(self.buffer)


def create_region(num_bytes: int) -> tuple[SharedRegion, int]:
    """The caller closes the descriptor. Pages are allocated on first use."""
    descriptor = os.memfd_create("kvrelay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return SharedRegion(secrets.token_bytes(REGION_ID_BYTES), mmap.mmap(descriptor, num_bytes)), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def open_region(region_id: bytes, descriptor: int) -> SharedRegion:
    """Maps another process's region for reading.

    Raises:
        TransferError: it can be resized, or is too large.
        OSError: it is no memory.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise TransferError("the region's size is not sealed")
    num_bytes = os.fstat(descriptor).st_size
    if not 0 < num_bytes <= MAX_REGION_BYTES:
        raise TransferError(f"a region of {num_bytes} bytes is not taken; at most {MAX_REGION_BYTES} are")
    return SharedRegion(region_id, mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ))


def peer_is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
