"""Transport through shared memory for workers on one host.

    pool --copy--> slot of a region --digest--> offset over gRPC --digest, copy--> the other pool

Each push has its own region, cut into slots. A slot is reused once the receiver answered its chunk,
a region only after a complete push, so that no late access reaches another push.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from kvrelay.config.settings import BYTES_PER_MIB, TransferSettings
from kvrelay.core.job import SequenceToken
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.codec import Chunk, SharedChunk, SharedSlice, encode_shared_chunk
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.shared_memory import SharedRegion, is_supported
from kvrelay.kv_transfer.shm_fd_passing import RegionClient
from kvrelay.kv_transfer.transports import GrpcPush, GrpcTransport, KVPush, KVTransport, PushPlan, Reply
from kvrelay.security.credentials import Towards, in_plain_text

BYTES_PER_KIB = 1024
MAX_SLOT_BYTES = 8 * 1024 * 1024  # waking threads for a chunk costs as much as copying some MiB
MIN_SLOTS = 3  # one is written, one is read, one is under way
SLOT_ALIGNMENT = 4096
RETRY_S = 60.0  # before asking a receiver again that shares no memory

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Peer:
    connecting: asyncio.Task[RegionClient | None]
    since: float

    @property
    def is_stale(self) -> bool:
        if not self.connecting.done():
            return False
        if self.connecting.cancelled() or self.connecting.exception() is not None:
            return True
        client = self.connecting.result()
        return client.is_closed if client is not None else time.monotonic() - self.since > RETRY_S

    def close(self) -> None:
        if self.connecting.cancel() or self.connecting.cancelled() or self.connecting.exception() is not None:
            return
        if (client := self.connecting.result()) is not None:
            client.close()


def create_transport(settings: TransferSettings, towards: Towards = in_plain_text) -> KVTransport:
    max_payload_bytes = settings.transfer_message_kib * BYTES_PER_KIB
    grpc = GrpcTransport(settings.transfer_connect_timeout_ms, max_payload_bytes, towards)
    if settings.transfer_transport == "grpc":
        return grpc
    is_required = settings.transfer_transport == "shared-memory"
    return SharedMemoryTransport(grpc, settings.transfer_window_mib * BYTES_PER_MIB, is_required=is_required)


class SharedMemoryTransport:
    """Uses gRPC if the receiver shares no memory, unless sharing is required."""

    def __init__(self, grpc: GrpcTransport, region_bytes: int, *, is_required: bool = False) -> None:
        self._grpc = grpc
        self._region_bytes = region_bytes
        self._is_required = is_required
        self._peers: dict[str, _Peer] = {}

    async def open(self, address: str, plan: PushPlan) -> KVPush:
        client = await self._client(address)
        region = await client.lease() if client is not None else None
        if client is None or region is None:
            if client is None and self._is_required:
                raise TransferError(f"no memory can be shared with the decode worker at {address}")
            return await self._grpc.open(address, plan)
        try:
            push = await self._grpc.open(address, plan, region.region_id)
        except BaseException:
            client.discard(region)
            raise
        return SharedMemoryPush(push, client, region)

    async def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        await self._grpc.close()

    async def _client(self, address: str) -> RegionClient | None:
        if not is_supported():
            return None
        peer = self._peers.get(address)
        if peer is None or peer.is_stale:
            self._forget_stale_peers()
            connecting = asyncio.get_running_loop().create_task(self._connect(address), name="share memory")
            peer = self._peers[address] = _Peer(connecting, time.monotonic())
        # Shielded, because other pushes await the same task.
        return await asyncio.shield(peer.connecting)

    def _forget_stale_peers(self) -> None:
        for address in [address for address, peer in self._peers.items() if peer.is_stale]:
            self._peers.pop(address).close()

    async def _connect(self, address: str) -> RegionClient | None:
        endpoint = await self._grpc.find_endpoint(address)
        if endpoint is None:
            _log.info("KV goes over gRPC: the decode worker shares no memory", address=address)
            return None
        try:
            client = await RegionClient.connect(endpoint, self._region_bytes)
        except (OSError, TransferError) as error:
            _log.info(
                "KV goes over gRPC: no memory can be shared with the decode worker", address=address, problem=str(error)
            )
            return None
        _log.info("KV goes through shared memory", address=address)
        return client


class SharedMemoryPush:
    transport_name = "shared-memory"

    def __init__(self, push: GrpcPush, client: RegionClient, region: SharedRegion) -> None:
        self._push = push
        self._client = client
        self._region: SharedRegion | None = region
        self._buffer = region.buffer
        slot_bytes = min(MAX_SLOT_BYTES, region.num_bytes // MIN_SLOTS)
        self.max_payload_bytes = slot_bytes - slot_bytes % SLOT_ALIGNMENT if slot_bytes > SLOT_ALIGNMENT else slot_bytes
        num_slots = region.num_bytes // self.max_payload_bytes
        # Last freed, first used: its memory is in the caches of both processes.
        self._free_offsets = [slot * self.max_payload_bytes for slot in reversed(range(num_slots))]
        self._used_offsets: dict[KVSpan, int] = {}
        self._acked: set[KVSpan] = set()

    def has_room(self) -> bool:
        return bool(self._free_offsets)

    def acquire_buffer(self, span: KVSpan, num_bytes: int) -> memoryview:
        if num_bytes > self.max_payload_bytes or span in self._acked or not self._free_offsets:
            # Too large, or refused before: sent in its message, because the region may be broken.
            return self._push.acquire_buffer(span, num_bytes)
        offset = self._used_offsets[span] = self._free_offsets.pop()
        return self._buffer[offset : offset + num_bytes]

    def encode(self, chunk: Chunk) -> bytes:
        offset = self._used_offsets.get(chunk.span)
        if offset is None:
            return self._push.encode(chunk)
        where = SharedSlice(offset, memoryview(chunk.payload).nbytes)
        return encode_shared_chunk(SharedChunk(chunk.span, where, chunk.digest))

    def ack(self, span: KVSpan) -> None:
        self._acked.add(span)
        if (offset := self._used_offsets.pop(span, None)) is not None:
            self._free_offsets.append(offset)

    async def send_chunk(self, encoded: Any) -> None:
        await self._push.send_chunk(encoded)

    async def send_end(self, num_chunks: int, tokens: Sequence[SequenceToken]) -> None:
        await self._push.send_end(num_chunks, tokens)

    def replies(self) -> AsyncGenerator[Reply, None]:
        return self._push.replies()

    def close(self, *, is_complete: bool) -> None:
        self._push.close(is_complete=is_complete)
        region, self._region = self._region, None
        if region is None:
            return
        if is_complete:
            self._client.release(region)
        else:
            self._client.discard(region)
