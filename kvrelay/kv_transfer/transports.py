"""How chunks reach the other worker: a seam, and the way over gRPC. Knows nothing of where chunks come from.

A transport opens one push for each work. A payload is copied out of the pool into memory that the push gives, for only the push
knows where it must lie. What `encode` returns is opaque to the sender: it is made in an export thread, and sent from the event
loop. `kvrelay.kv_transfer.shared_memory_transport` has the way through shared memory.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import grpc

from kvrelay.errors import TransferError
from kvrelay.kv_transfer.codec import Chunk, ChunkMessage, encode_chunk, end_digest
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.memory_handover import HandoverOffer
from kvrelay.model_spec import WIRE_VERSION
from kvrelay.rpc import create_channel
from kvrelay.trace_context import METADATA_KEY, TraceContext
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire import sequence_token_to_pb, work_id_to_pb
from kvrelay.work import SequenceToken, WorkId

PUSH_METHOD = "/kvrelay.v1.KVTransferService/Push"
OFFER_METHOD = "/kvrelay.v1.KVTransferService/OfferSharedMemory"
MAX_CHANNELS = 64


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What is going to be pushed, and by what right."""

    work_id: WorkId
    ticket: bytes
    fingerprint: str
    token_begin: int
    token_end: int
    trace: TraceContext | None = None
    """Of the push, if the work is traced: goes along as metadata."""


@dataclass(frozen=True, slots=True)
class ChunkAccepted:
    """The chunk that begins there is checked and written, and all that were sent before it and not refused."""

    layer_begin: int
    token_begin: int


@dataclass(frozen=True, slots=True)
class ChunkRefused:
    """The chunk that begins there was not written."""

    layer_begin: int
    token_begin: int
    message: str


@dataclass(frozen=True, slots=True)
class PushComplete:
    """Everything is with the receiver."""

    kv_bytes: int


Reply = ChunkAccepted | ChunkRefused | PushComplete


class KVPush(Protocol):
    """One open push. Whoever opened it calls `close`, whatever happened."""

    @property
    def transport_name(self) -> str:
        """How payloads travel, for people."""
        raise NotImplementedError

    @property
    def max_payload_bytes(self) -> int:
        """Largest payload of one chunk that this push is made for."""
        raise NotImplementedError

    def has_room(self) -> bool:
        """Whether there is memory for one more payload now; there is again when the receiver has answered."""
        raise NotImplementedError

    def take_buffer(self, span: KVSpan, num_bytes: int) -> memoryview:
        """Memory for the payload of a chunk: exactly so many writable bytes."""
        raise NotImplementedError

    def encode(self, chunk: Chunk) -> Any:
        """Makes the chunk, whose payload is in the buffer that was taken for it, ready to be sent; called in any thread."""

    def settle(self, span: KVSpan) -> None:
        """The receiver has answered the chunk."""

    async def send_chunk(self, encoded: Any) -> None:
        """Sends what `encode` gave."""

    async def send_end(self, num_chunks: int, tokens: Sequence[SequenceToken]) -> None:
        """Says that no chunk follows."""

    def replies(self) -> AsyncGenerator[Reply, None]:
        """What the receiver says, in order, until it ends the push. To be closed by who reads less than all."""
        raise NotImplementedError

    def close(self, *, is_complete: bool) -> None:
        """Forgets the push when it is complete, or breaks it off."""


class KVTransport(Protocol):
    """Opens pushes."""

    async def open(self, address: str, plan: PushPlan) -> KVPush:
        """Reaches the receiver and sends the header.

        Raises:
            TransferError: it cannot be reached in time.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Closes all connections."""


class GrpcTransport:
    """KV over gRPC streams, with one connection per receiver.

    Args:
        connect_timeout_ms: most time to reach a receiver.
        max_payload_bytes: largest payload of one message.
    """

    def __init__(self, connect_timeout_ms: int, max_payload_bytes: int = 4 << 20) -> None:
        self._connect_timeout_s = connect_timeout_ms / 1000
        self._max_payload_bytes = max_payload_bytes
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._open_channels: WeakSet[grpc.aio.Channel] = WeakSet()
        """Those that were dropped for others too, while their pushes last."""
        self._closed = False

    async def open(self, address: str, plan: PushPlan, region_id: bytes = b"") -> GrpcPush:
        """Reaches the receiver and sends the header.

        Args:
            address: host:port.
            plan: what will be pushed.
            region_id: of the region of shared memory in which chunks may lie.

        Raises:
            TransferError: it cannot be reached in time, or the transport is closed.
        """
        channel = self._channel(address)
        push = GrpcPush(channel, self._max_payload_bytes, plan.trace)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                # Connects first. Waiting for the state of the channel instead would leave a watch behind when cancelled.
                await push.send_header(plan, region_id)
        except TimeoutError:
            self._break_off(push, address, channel)
            raise self._not_reached(address) from None
        except BaseException:
            self._break_off(push, address, channel)
            raise
        return push

    async def offer(self, address: str) -> HandoverOffer | None:
        """Where the receiver takes shared memory; None when it takes none.

        Raises:
            TransferError: it cannot be reached in time, or the transport is closed.
        """
        channel = self._channel(address)
        method = channel.unary_unary(
            OFFER_METHOD,
            request_serializer=kv_transfer_pb2.OfferSharedMemoryRequest.SerializeToString,
            response_deserializer=kv_transfer_pb2.OfferSharedMemoryResponse.FromString,
        )
        request = kv_transfer_pb2.OfferSharedMemoryRequest()
        try:
            response: Any = await method(request, timeout=self._connect_timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            self._drop(address, channel)
            raise self._not_reached(address) from error
        if not response.socket_name:
            return None
        return HandoverOffer(response.socket_name, response.key, response.max_region_bytes, response.max_regions)

    def _not_reached(self, address: str) -> TransferError:
        timeout_ms = round(self._connect_timeout_s * 1000)
        return TransferError(f"the decode worker at {address} was not reached within {timeout_ms} ms")

    def _break_off(self, push: GrpcPush, address: str, channel: grpc.aio.Channel) -> None:
        push.close(is_complete=False)
        self._drop(address, channel)

    def _drop(self, address: str, channel: grpc.aio.Channel) -> None:
        if self._channels.get(address) is channel:
            # The next attempt connects anew at once, instead of waiting out this channel's backoff.
            del self._channels[address]

    async def close(self) -> None:
        """Closes all connections, and opens none any more: gRPC does not let a process end that has one left."""
        self._closed = True
        self._channels.clear()
        for channel in list(self._open_channels):
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        """The channel to a receiver. One that is dropped from here closes itself when its last push lets go of it."""
        if self._closed:
            raise TransferError("the prefill worker is shutting down")
        channel = self._channels.pop(address, None) or create_channel(address)
        self._channels[address] = channel
        self._open_channels.add(channel)
        while len(self._channels) > MAX_CHANNELS:
            self._channels.popitem(last=False)
        return channel


class GrpcPush:
    """A Push call. Payloads are written into the messages that carry them.

    Args:
        channel: to the receiver.
        max_payload_bytes: largest payload of one message.
        trace: that the call is part of.
    """

    transport_name = "grpc"

    def __init__(self, channel: grpc.aio.Channel, max_payload_bytes: int, trace: TraceContext | None = None) -> None:
        method = channel.stream_stream(
            PUSH_METHOD, request_serializer=_already_bytes, response_deserializer=kv_transfer_pb2.PushResponse.FromString
        )
        self._channel = channel  # lives as long as the push
        self.max_payload_bytes = max_payload_bytes
        self._plan: PushPlan | None = None
        self._messages: dict[KVSpan, ChunkMessage] = {}
        """Whose payloads are being written."""
        # A receiver that is just starting is waited for, as long as the opener allows.
        metadata = None if trace is None else ((METADATA_KEY, trace.traceparent),)
        self._call: Any = method(wait_for_ready=True, metadata=metadata)

    def has_room(self) -> bool:
        return True

    def take_buffer(self, span: KVSpan, num_bytes: int) -> memoryview:
        message = self._messages[span] = ChunkMessage(span, num_bytes)
        return message.payload

    def encode(self, chunk: Chunk) -> bytes:
        message = self._messages.pop(chunk.span, None)
        if message is not None and chunk.payload is message.payload:
            return message.finish(chunk.digest)
        return encode_chunk(chunk)

    def settle(self, span: KVSpan) -> None:
        """Nothing to do: the message was copied when it was sent."""

    async def send_header(self, plan: PushPlan, region_id: bytes = b"") -> None:
        """The first message."""
        self._plan = plan
        header = kv_transfer_pb2.PushHeader(
            work_id=work_id_to_pb(plan.work_id),
            ticket=plan.ticket,
            fingerprint=plan.fingerprint,
            wire_version=WIRE_VERSION,
            token_begin=plan.token_begin,
            token_end=plan.token_end,
            shared_region=region_id,
        )
        await self._write(kv_transfer_pb2.PushRequest(header=header).SerializeToString())

    async def send_chunk(self, encoded: bytes) -> None:
        await self._write(encoded)

    async def send_end(self, num_chunks: int, tokens: Sequence[SequenceToken]) -> None:
        assert self._plan is not None, "the header goes first"
        digest = end_digest(self._plan.ticket, self._plan.work_id.attempt, num_chunks, tokens)
        messages = [sequence_token_to_pb(token) for token in tokens]
        end = kv_transfer_pb2.PushEnd(num_chunks=num_chunks, tokens=messages, digest=digest)
        await self._write(kv_transfer_pb2.PushRequest(end=end).SerializeToString())

    async def replies(self) -> AsyncGenerator[Reply, None]:
        responses: Any = aiter(self._call)
        try:
            async for response in responses:
                yield _reply_from_pb(response)
        except grpc.aio.AioRpcError as error:
            raise TransferError(f"the decode worker broke the push off: {error.details()}") from error
        finally:
            # Call and iterator hold each other until it has ended, and so everything of the call until a full collection.
            await responses.aclose()

    def close(self, *, is_complete: bool) -> None:
        self._call.cancel()

    async def _write(self, request: bytes) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else "the call has ended"
            raise TransferError(f"the decode worker broke the push off: {details}") from error


def _already_bytes(request: bytes) -> bytes:
    return request


def _reply_from_pb(response: kv_transfer_pb2.PushResponse) -> Reply:
    match response.WhichOneof("message"):
        case "chunk_accepted":
            return ChunkAccepted(response.chunk_accepted.layer_begin, response.chunk_accepted.token_begin)
        case "chunk_refused":
            refused = response.chunk_refused
            return ChunkRefused(refused.layer_begin, refused.token_begin, refused.message)
        case "complete":
            return PushComplete(response.complete.kv_bytes)
        case other:
            raise TransferError(f"the decode worker sent an unknown message: {other}")
