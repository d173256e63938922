"""How chunks reach the other worker: the interface, and the transport over gRPC.

A push provides the memory into which the sender copies payloads. An export thread encodes, the
event loop sends.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import grpc

from kvrelay.core.job import JobId, SequenceToken
from kvrelay.core.model_spec import WIRE_VERSION
from kvrelay.core.trace_context import METADATA_KEY, TraceContext
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.codec import Chunk, ChunkMessage, encode_chunk, end_digest
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.shm_fd_passing import ShmEndpoint
from kvrelay.network.first_status import FirstStatus
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import ChannelCredentials, Towards, in_plain_text
from kvrelay.security.principal import Role
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire.convert import job_id_to_pb, sequence_token_to_pb

PUSH_METHOD = "/kvrelay.v1.KVTransferService/Push"
OFFER_METHOD = "/kvrelay.v1.KVTransferService/OfferSharedMemory"
MAX_CHANNELS = 64
NUM_TRANSFER_THREADS = 2  # of a worker, which copy KV out of its pool or into it


@dataclass(frozen=True, slots=True)
class PushPlan:
    job_id: JobId
    ticket: bytes
    fingerprint: str
    token_begin: int
    token_end: int
    trace: TraceContext | None = None  # travels as metadata


@dataclass(frozen=True, slots=True)
class ChunkAccepted:
    """The receiver wrote this chunk, and all earlier ones not refused."""

    layer_begin: int
    token_begin: int


@dataclass(frozen=True, slots=True)
class ChunkRefused:
    layer_begin: int
    token_begin: int
    message: str


@dataclass(frozen=True, slots=True)
class PushComplete:
    kv_bytes: int


Reply = ChunkAccepted | ChunkRefused | PushComplete


class KVPush(Protocol):
    """Its opener must call `close`."""

    @property
    def transport_name(self) -> str:
        raise NotImplementedError

    @property
    def max_payload_bytes(self) -> int:
        raise NotImplementedError

    def has_room(self) -> bool:
        """Whether there is memory for one more payload."""
        raise NotImplementedError

    def acquire_buffer(self, span: KVSpan, num_bytes: int) -> memoryview:
        raise NotImplementedError

    def encode(self, chunk: Chunk) -> Any:
        """Prepares a chunk, whose payload is in its buffer; in any thread."""

    def ack(self, span: KVSpan) -> None:
        """The receiver answered the chunk; frees its buffer."""

    async def send_chunk(self, encoded: Any) -> None:
        """Sends what `encode` gave."""

    async def send_end(self, num_chunks: int, tokens: Sequence[SequenceToken]) -> None:
        """Says that no chunk follows."""

    def replies(self) -> AsyncGenerator[Reply, None]:
        """Ends when the receiver ends the push; close it to stop early."""
        raise NotImplementedError

    def close(self, *, is_complete: bool) -> None:
        """Releases a complete push, or breaks it off."""


class KVTransport(Protocol):
    async def open(self, address: str, plan: PushPlan) -> KVPush:
        """Raises TransferError if the receiver cannot be reached in time."""
        raise NotImplementedError

    async def close(self) -> None:
        """Closes all connections."""


class GrpcTransport:
    """One connection per receiver."""

    def __init__(
        self, connect_timeout_ms: int, max_payload_bytes: int = 4 << 20, towards: Towards = in_plain_text
    ) -> None:
        self._towards = towards
        self._credentials: ChannelCredentials | None = None
        self._connect_timeout_s = connect_timeout_ms / 1000
        self._max_payload_bytes = max_payload_bytes
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        # Includes dropped ones whose pushes still run.
        self._open_channels: WeakSet[grpc.aio.Channel] = WeakSet()
        self._closed = False

    async def open(self, address: str, plan: PushPlan, region_id: bytes = b"") -> GrpcPush:
        channel = self._channel(address)
        push = GrpcPush(channel, self._max_payload_bytes, plan.trace)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                # Connects first. A cancelled wait for the channel's state leaves a watch behind.
                await push.send_header(plan, region_id)
        except TimeoutError:
            self._break_off(push, address, channel)
            raise self._not_reached(address) from None
        except BaseException:
            self._break_off(push, address, channel)
            raise
        return push

    async def find_endpoint(self, address: str) -> ShmEndpoint | None:
        """None: the receiver takes none. Raises TransferError if it cannot be reached."""
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
        return ShmEndpoint(response.socket_name, response.key, response.max_region_bytes, response.max_regions)

    def _not_reached(self, address: str) -> TransferError:
        timeout_ms = round(self._connect_timeout_s * 1000)
        return TransferError(f"the decode worker at {address} was not reached within {timeout_ms} ms")

    def _break_off(self, push: GrpcPush, address: str, channel: grpc.aio.Channel) -> None:
        push.close(is_complete=False)
        self._drop(address, channel)

    def _drop(self, address: str, channel: grpc.aio.Channel) -> None:
        if self._channels.get(address) is channel:
            # The next attempt connects at once, without this channel's backoff.
            del self._channels[address]

    async def close(self) -> None:
        """An open connection would keep the process from ending."""
        self._closed = True
        self._channels.clear()
        for channel in list(self._open_channels):
            await channel.close()

    def _channel(self, address: str) -> grpc.aio.Channel:
        """A dropped channel closes itself after its last push."""
        if self._closed:
            raise TransferError("the prefill worker is shutting down")
        credentials = self._towards(Role.DECODE)
        if credentials != self._credentials:
            self._credentials = credentials
            self._channels.clear()  # running pushes go on with theirs
        channel = self._channels.pop(address, None) or create_channel(address, credentials=credentials)
        self._channels[address] = channel
        self._open_channels.add(channel)
        while len(self._channels) > MAX_CHANNELS:
            self._channels.popitem(last=False)
        return channel


class GrpcPush:
    """Payloads are written into the messages that carry them."""

    transport_name = "grpc"

    def __init__(self, channel: grpc.aio.Channel, max_payload_bytes: int, trace: TraceContext | None = None) -> None:
        method = channel.stream_stream(
            PUSH_METHOD,
            request_serializer=_already_bytes,
            response_deserializer=kv_transfer_pb2.PushResponse.FromString,
        )
        self._channel = channel  # lives as long as the push
        self.max_payload_bytes = max_payload_bytes
        self._plan: PushPlan | None = None
        self._messages: dict[KVSpan, ChunkMessage] = {}  # payloads are being written
        # Waits for a receiver that is starting, as long as the opener allows.
        metadata = None if trace is None else ((METADATA_KEY, trace.traceparent),)
        self._call: Any = method(wait_for_ready=True, metadata=metadata)
        self._status = FirstStatus(self._call)

    def has_room(self) -> bool:
        return True

    def acquire_buffer(self, span: KVSpan, num_bytes: int) -> memoryview:
        message = self._messages[span] = ChunkMessage(span, num_bytes)
        return message.payload

    def encode(self, chunk: Chunk) -> bytes:
        message = self._messages.pop(chunk.span, None)
        if message is not None and chunk.payload is message.payload:
            return message.finish(chunk.digest)
        return encode_chunk(chunk)

    def ack(self, span: KVSpan) -> None:
        """No effect: sending copied the message."""

    async def send_header(self, plan: PushPlan, region_id: bytes = b"") -> None:
        self._plan = plan
        header = kv_transfer_pb2.PushHeader(
            job_id=job_id_to_pb(plan.job_id),
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
        digest = end_digest(self._plan.ticket, self._plan.job_id.attempt, num_chunks, tokens)
        messages = [sequence_token_to_pb(token) for token in tokens]
        end = kv_transfer_pb2.PushEnd(num_chunks=num_chunks, tokens=messages, digest=digest)
        await self._write(kv_transfer_pb2.PushRequest(end=end).SerializeToString())

    async def replies(self) -> AsyncGenerator[Reply, None]:
        responses: Any = aiter(self._call)
        try:
            async for response in responses:
                yield _reply_from_pb(response)
        except grpc.aio.AioRpcError as error:
            raise self._broken_off(error) from error
        finally:
            # Otherwise call and iterator keep each other alive until a full collection.
            await responses.aclose()

    def close(self, *, is_complete: bool) -> None:
        self._call.cancel()

    async def _write(self, request: bytes) -> None:
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise self._broken_off(error) from error

    def _broken_off(self, failure: Exception) -> TransferError:
        cause = self._status.cause_of(failure)
        details = cause.details() if isinstance(cause, grpc.aio.AioRpcError) else "the call has ended"
        return TransferError(f"the decode worker broke the push off: {details}")


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
