"""Passes regions of shared memory from a prefill worker to a decode worker, over a socket.

    prefill worker: RegionClient                             decode worker: RegionServer
        key                    ------------------------->      compared; the user must be the same
        region id, descriptor  ------------------------->      seals and size checked, mapped
                               <-------------------------      taken, or not
        region id              ------------------------->      unmapped when no push uses it
        end of the connection  ------------------------->      all of its regions likewise

The socket is abstract: only this network namespace can reach it. Runs on the event loop.
"""

import asyncio
import hmac
import os
import secrets
import socket
from dataclasses import dataclass, field

import structlog

from kvrelay.errors import TransferError
from kvrelay.kv_transfer.shared_memory import (
    MAX_REGION_BYTES,
    MAX_REGIONS,
    REGION_ID_BYTES,
    SharedRegion,
    create_region,
    is_supported,
    open_region,
    peer_is_same_user,
)

KEY_BYTES = 16
MAX_CONNECTIONS = 64
MAX_MESSAGE_BYTES = 64
KEY_TIMEOUT_S = 5.0
TAKEN = b"taken"
NOT_TAKEN = b"not taken"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ShmEndpoint:
    socket_name: str
    key: bytes
    max_region_bytes: int = MAX_REGION_BYTES
    max_regions: int = MAX_REGIONS


class RegionServer:
    """Lends each region to one push at a time."""

    def __init__(self) -> None:
        self.endpoint = ShmEndpoint(f"kvrelay-{secrets.token_hex(16)}", secrets.token_bytes(KEY_BYTES))
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._regions: dict[bytes, SharedRegion] = {}
        self._lent: set[bytes] = set()

    def start(self) -> bool:
        """False: this machine cannot share memory."""
        if not is_supported():
            return False
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(f"\0{self.endpoint.socket_name}")
            listener.listen(MAX_CONNECTIONS)
        except OSError as error:
            listener.close()
            _log.info("no shared memory for KV", problem=str(error))
            return False
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept)
        return True

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    @property
    def num_regions(self) -> int:
        return len(self._regions)

    def close(self) -> None:
        """Pushes keep their regions until they release them."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            self._drop(connection)

    def lend(self, region_id: bytes) -> SharedRegion:
        """Raises TransferError if the region is unknown or lent."""
        region = self._regions.get(region_id)
        if region is None or region_id in self._lent:
            raise TransferError("the region of shared memory is not known, or another push has it")
        self._lent.add(region_id)
        return region

    def release(self, region: SharedRegion) -> None:
        self._lent.discard(region.region_id)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # the client has gone
        if len(self._connections) >= MAX_CONNECTIONS or not peer_is_same_user(accepted):
            accepted.close()
            return
        accepted.setblocking(False)
        loop = asyncio.get_running_loop()
        connection = _Connection(accepted)
        self._connections.add(connection)
        connection.timer = loop.call_later(KEY_TIMEOUT_S, self._drop, connection)
        loop.add_reader(accepted, self._read, connection)

    def _read(self, connection: "_Connection") -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(connection.socket, MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        try:
            if not message or not self._handle_message(connection, message, descriptors):
                self._drop(connection)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _handle_message(self, connection: "_Connection", message: bytes, descriptors: list[int]) -> bool:
        """False: the connection must end."""
        if connection.timer is not None:
            if not hmac.compare_digest(message, self.endpoint.key):
                return False
            connection.timer.cancel()
            connection.timer = None
            return True
        if len(message) != REGION_ID_BYTES:
            return False
        if not descriptors:
            self._forget(connection, message)
            return True
        taken = self._take_region(connection, message, descriptors[0])
        try:
            connection.socket.send(TAKEN if taken else NOT_TAKEN)
        except OSError:
            return False
        return True

    def _take_region(self, connection: "_Connection", region_id: bytes, descriptor: int) -> bool:
        if region_id in self._regions or len(connection.region_ids) >= MAX_REGIONS:
            return False
        try:
            self._regions[region_id] = open_region(region_id, descriptor)
        except (OSError, ValueError, TransferError) as error:
            _log.warning("a region of shared memory was not taken", problem=str(error))
            return False
        connection.region_ids.add(region_id)
        return True

    def _forget(self, connection: "_Connection", region_id: bytes) -> None:
        if region_id in connection.region_ids:
            connection.region_ids.remove(region_id)
            # Only a push that borrowed the region keeps its mapping alive.
            self._regions.pop(region_id)
            self._lent.discard(region_id)

    def _drop(self, connection: "_Connection") -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        if connection.timer is not None:
            connection.timer.cancel()
        asyncio.get_running_loop().remove_reader(connection.socket)
        connection.socket.close()
        for region_id in list(connection.region_ids):
            self._forget(connection, region_id)


@dataclass(eq=False, slots=True)
class _Connection:
    socket: socket.socket
    timer: asyncio.TimerHandle | None = None  # ends it unless the key comes; None after the key
    region_ids: set[bytes] = field(default_factory=set)


class RegionClient:
    def __init__(self, connection: socket.socket, endpoint: ShmEndpoint, region_bytes: int) -> None:
        self._socket = connection
        self._max_regions = endpoint.max_regions
        self._region_bytes = min(region_bytes, endpoint.max_region_bytes)
        self._num_regions = 0
        self._free: list[SharedRegion] = []
        self._handing_over = asyncio.Lock()
        self._answer: asyncio.Future[bytes] | None = None
        self.is_closed = False
        asyncio.get_running_loop().add_reader(connection, self._read)

    @classmethod
    async def connect(cls, endpoint: ShmEndpoint, region_bytes: int) -> "RegionClient":
        """Raises OSError if the worker is on another host, TransferError if another user's."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, f"\0{endpoint.socket_name}")
            if not peer_is_same_user(connection):
                raise TransferError("the decode worker runs as another user")
            connection.send(endpoint.key)
            return cls(connection, endpoint, region_bytes)
        except BaseException:
            connection.close()
            raise

    async def lease(self) -> SharedRegion | None:
        """Must be followed by `release` or `discard`."""
        if self._free:
            return self._free.pop()  # the last one used: its memory is in the caches
        if self.is_closed or self._num_regions >= self._max_regions:
            return None
        self._num_regions += 1
        region: SharedRegion | None = None
        try:
            async with self._handing_over:
                region = await self._hand_over()
        finally:
            if region is None:
                self._num_regions -= 1
        return region

    def release(self, region: SharedRegion) -> None:
        """After a complete push."""
        if not self.is_closed:
            self._free.append(region)

    def discard(self, region: SharedRegion) -> None:
        """After a broken push: either side may still use the region, so it is never used again."""
        self._num_regions -= 1
        if not self.is_closed:
            try:
                self._socket.send(region.region_id)
            except OSError:
                self.close()  # the server then forgets all regions

    def close(self) -> None:  # idempotent
        if self.is_closed:
            return
        self.is_closed = True
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._free.clear()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(b"")

    async def _hand_over(self) -> SharedRegion | None:
        if self.is_closed:
            return None
        try:
            region, descriptor = create_region(self._region_bytes)
        except (OSError, ValueError) as error:
            _log.info("no shared memory for KV", problem=str(error))
            return None
        self._answer = asyncio.get_running_loop().create_future()
        try:
            socket.send_fds(self._socket, [region.region_id], [descriptor])
        except OSError:
            self.close()
            return None
        finally:
            os.close(descriptor)
        return region if await self._answer == TAKEN else None

    def _read(self) -> None:
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message and self._answer is not None and not self._answer.done():
            self._answer.set_result(message)
        else:
            self.close()
