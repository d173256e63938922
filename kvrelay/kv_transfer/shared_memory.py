"""Memory that two processes of one host share for KV payloads.

A region is an anonymous file (memfd): it has no name, so nobody else can open it and nothing is left when both processes are
gone, however they ended. Its size is sealed, so that neither side can be made to fault by the other. The prefill worker makes
it and writes into it; the decode worker only reads. `kvrelay.kv_transfer.memory_handover` is how it gets there.

Knows nothing of what lies in a region. Where there is no memfd (not Linux) nothing is shared.
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
MAX_REGIONS = 8
"""Of one connection: so many pushes of one prefill worker at a time have a region."""

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
_PEER_CREDENTIALS = struct.Struct("3i")  # process, user, group


def is_supported() -> bool:
    """Whether this system has what sharing needs: memfd with seals, and abstract sockets."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


@dataclass(eq=False)
class SharedRegion:
    """Memory that both sides have mapped."""

    region_id: bytes
    memory: mmap.mmap
    buffer: memoryview = field(init=False)
    """All of it, writable on the sender's side."""

    def __post_init__(self) -> None:
        self.buffer = memoryview(self.memory)

    @property
    def num_bytes(self) -> int:
        return len(self.buffer)


def create_region(num_bytes: int) -> tuple[SharedRegion, int]:
    """A new region, and the descriptor to hand over; the caller closes it. Memory is taken as it is touched.

    Raises:
        OSError: there is none.
    """
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
    """Maps a region that another process made, for reading. The descriptor stays the caller's.

    Raises:
        TransferError: it can be resized, or is larger than allowed.
        OSError: it is no memory.
    """
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise TransferError("the region's size is not sealed")
    num_bytes = os.fstat(descriptor).st_size
    if not 0 < num_bytes <= MAX_REGION_BYTES:
        raise TransferError(f"a region of {num_bytes} bytes is not taken; at most {MAX_REGION_BYTES} are")
    return SharedRegion(region_id, mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ))


def peer_is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket runs as the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, user, _ = _PEER_CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
