"""How regions of shared memory get from a prefill worker to a decode worker: both ends of the socket.

    prefill worker: HandoverClient                           decode worker: HandoverServer
        key                    ------------------------->      compared; the user must be the same
        region id, descriptor  ------------------------->      seals and size checked, mapped
                               <-------------------------      taken, or not
        region id              ------------------------->      forgotten: unmapped when no push uses it
        end of the connection  ------------------------->      all of its regions are forgotten

The socket is abstract: it has no file, and nobody outside of this network namespace can reach it. Runs on the event loop.
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
MAX_LETTER_BYTES = 64
KEY_TIMEOUT_S = 5.0
TAKEN = b"taken"
NOT_TAKEN = b"not taken"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HandoverOffer:
    """Where a decode worker takes regions, and with what key."""

    socket_name: str
    key: bytes
    max_region_bytes: int = MAX_REGION_BYTES
    max_regions: int = MAX_REGIONS


class HandoverServer:
    """Takes regions and lends them to pushes, one push at a time each."""

    def __init__(self) -> None:
        self.offer = HandoverOffer(f"kvrelay-{secrets.token_hex(16)}", secrets.token_bytes(KEY_BYTES))
        self._listener: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._regions: dict[bytes, SharedRegion] = {}
        self._lent: set[bytes] = set()

    def start(self) -> bool:
        """Listens, within a running loop. False where nothing can be shared."""
        if not is_supported():
            return False
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(f"\0{self.offer.socket_name}")
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
        """Regions that are mapped for others."""
        return len(self._regions)

    def close(self) -> None:
        """Takes no more, and forgets all regions; those that pushes have stay until these let go."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            self._drop(connection)

    def lend(self, region_id: bytes) -> SharedRegion:
        """The region, for one push. `give_back` must follow.

        Raises:
            TransferError: it was not handed over, or another push has it.
        """
        region = self._regions.get(region_id)
        if region is None or region_id in self._lent:
            raise TransferError("the region of shared memory is not known, or another push has it")
        self._lent.add(region_id)
        return region

    def give_back(self, region: SharedRegion) -> None:
        """The push does not read it any more."""
        self._lent.discard(region.region_id)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return  # whoever knocked has gone
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
            letter, descriptors, _, _ = socket.recv_fds(connection.socket, MAX_LETTER_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        try:
            if not letter or not self._take_letter(connection, letter, descriptors):
                self._drop(connection)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _take_letter(self, connection: "_Connection", letter: bytes, descriptors: list[int]) -> bool:
        """False when the connection is to end."""
        if connection.timer is not None:
            if not hmac.compare_digest(letter, self.offer.key):
                return False
            connection.timer.cancel()
            connection.timer = None
            return True
        if len(letter) != REGION_ID_BYTES:
            return False
        if not descriptors:
            self._forget(connection, letter)
            return True
        taken = self._take_region(connection, letter, descriptors[0])
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
            # A push that has it keeps its mapping alive; nothing else does.
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
    timer: asyncio.TimerHandle | None = None
    """Ends the connection unless its key comes first; None once it has."""
    region_ids: set[bytes] = field(default_factory=set)


class HandoverClient:
    """One prefill worker's connection to one decode worker, and the regions that were handed over on it.

    Args:
        connection: connected, not blocking.
        offer: of the decode worker.
        region_bytes: size of each region.
    """

    def __init__(self, connection: socket.socket, offer: HandoverOffer, region_bytes: int) -> None:
        self._socket = connection
        self._max_regions = offer.max_regions
        self._region_bytes = min(region_bytes, offer.max_region_bytes)
        self._num_regions = 0
        self._free: list[SharedRegion] = []
        self._handing_over = asyncio.Lock()
        self._answer: asyncio.Future[bytes] | None = None
        self.is_closed = False
        asyncio.get_running_loop().add_reader(connection, self._read)

    @classmethod
    async def connect(cls, offer: HandoverOffer, region_bytes: int) -> "HandoverClient":
        """Connects and shows the key.

        Raises:
            OSError: there is no such socket here: the decode worker is on another host, or in another network namespace.
            TransferError: the process behind it is another user's.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, f"\0{offer.socket_name}")
            if not peer_is_same_user(connection):
                raise TransferError("the decode worker runs as another user")
            connection.send(offer.key)
            return cls(connection, offer, region_bytes)
        except BaseException:
            connection.close()
            raise

    async def lease(self) -> SharedRegion | None:
        """A region for one push; None when all are in use, or none can be had. `give_back` or `discard` must follow."""
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

    def give_back(self, region: SharedRegion) -> None:
        """The push was completed: nobody reads or writes the region any more."""
        if not self.is_closed:
            self._free.append(region)

    def discard(self, region: SharedRegion) -> None:
        """The push was broken off: somebody may still write or read, so the memory is never used again."""
        self._num_regions -= 1
        if not self.is_closed:
            try:
                self._socket.send(region.region_id)
            except OSError:
                self.close()  # the other side forgets all

    def close(self) -> None:
        """Ends the connection and frees what no push has. Idempotent."""
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
            letter = self._socket.recv(MAX_LETTER_BYTES)
        except BlockingIOError:
            return
        except OSError:
            letter = b""
        if letter and self._answer is not None and not self._answer.done():
            self._answer.set_result(letter)
        else:
            self.close()
