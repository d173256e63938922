"""A real receiver with a real pool, and pushes that a real sender made, kept as the bytes that it
sent.

Every push into the receiver goes through `KVReceiver.Push`: called directly, for there are many, or
over a real connection.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import grpc
import xxhash

from decode_worker.commands import PushEnded
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.receiving.write_grants import WriteGrants
from kvrelay.core.job import Job, JobId, SequenceToken, Token
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import KvrelayError
from kvrelay.kv_transfer.codec import Chunk, SharedChunk, decode_request
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.shared_memory import SharedRegion
from kvrelay.kv_transfer.shared_memory_transport import SharedMemoryPush
from kvrelay.kv_transfer.shm_fd_passing import RegionClient, RegionServer
from kvrelay.kv_transfer.transports import PUSH_METHOD, GrpcPush, PushPlan
from kvrelay.network.rpc import bind_server, create_server, create_sync_channel
from kvrelay.v1 import kv_transfer_pb2 as pb
from kvrelay.wire.errors import error_of_rpc
from prefill_worker.kv_sender import KVSender, SenderContext, TransferResult
from tests.support.jobs import make_job

LAYOUT = KVLayout(num_layers=3, num_kv_heads=1, head_dim=4, dtype="float32")
MODEL = ModelSpec("m", "llama", LAYOUT, 100, 512, (0,), "fingerprint")
NUM_TOKENS = 12
BLOCK_SIZE = 4
NUM_BLOCKS = 24
CHUNK_BYTES = NUM_TOKENS * LAYOUT.bytes_per_layer_token
"""A layer: each push has as many chunks as the model has layers."""
SHARED_REGION_BYTES = LAYOUT.num_layers * CHUNK_BYTES
WAIT_S = 20.0


@dataclass(frozen=True)
class Reservation:
    """A job whose KV may be pushed, and where to."""

    job: Job
    block_ids: tuple[int, ...]
    ticket: bytes


@dataclass(frozen=True)
class CapturedPush:
    """All that a sender sent: header, chunks, end."""

    reservation: Reservation
    messages: tuple[bytes, ...]
    kv: bytes
    """What it pushed, as `export_kv` gives it."""
    region: SharedRegion | None
    """Where its payloads lie; None when they are in the messages."""


@dataclass(frozen=True)
class PushOutcome:
    """How a push ended. `error` is None when it was accepted."""

    error: KvrelayError | None
    answers: tuple[str, ...]
    ended: PushEnded | None
    """What the engine was told; None when the push was refused before it could touch anything."""


class ReceiverBench:
    """A receiver, and all that a test looks at."""

    def __init__(self, address: str, channel: grpc.Channel, receiver: KVReceiver, memory: RegionServer) -> None:
        self.address = address
        self.receiver = receiver
        self.memory = memory
        self.pool = PagedKVCache(LAYOUT, NUM_BLOCKS, BLOCK_SIZE)
        self.grants = WriteGrants()
        self.ended: list[PushEnded] = []
        self._call: Any = channel.stream_stream(PUSH_METHOD)

    def pool_digest(self) -> str:
        """Of every byte of the pool."""
        return xxhash.xxh3_128_hexdigest(self.kv_of(range(NUM_BLOCKS)))

    def kv_of(self, block_ids: Sequence[int]) -> bytes:
        """All bytes of these blocks."""
        span = KVSpan(0, LAYOUT.num_layers, 0, len(block_ids) * BLOCK_SIZE)
        exported = bytearray(span.num_bytes(LAYOUT))
        self.pool.export_kv(memoryview(exported), span, list(block_ids))
        return bytes(exported)

    def open(self, reservation: Reservation) -> None:
        """Makes the grant, with the ticket that was in the captured push."""
        with mock.patch("decode_worker.receiving.write_grants.secrets.token_bytes", return_value=reservation.ticket):
            self.grants.grant(reservation.job, reservation.block_ids, 0)

    async def push(self, messages: Sequence[bytes], *, over_grpc: bool = False) -> PushOutcome:
        """Sends the messages and ends the stream behind them."""
        self.ended.clear()
        error, answers = await (self._push_over_grpc(messages) if over_grpc else self._push_directly(messages))
        assert len(self.ended) <= 1, "the engine is told once"
        return PushOutcome(error, answers, self.ended[0] if self.ended else None)

    async def _push_directly(self, messages: Sequence[bytes]) -> tuple[KvrelayError | None, tuple[str, ...]]:
        stream = _Stream(messages)
        try:
            await self.receiver.Push(None, stream)  # type: ignore[arg-type]  # what it uses of a context
        except KvrelayError as error:
            return error, tuple(stream.answers)
        return None, tuple(stream.answers)

    async def _push_over_grpc(self, messages: Sequence[bytes]) -> tuple[KvrelayError | None, tuple[str, ...]]:
        # In a thread: gRPC's asyncio client says INTERNAL when a stream ends while it writes to it,
        # whatever the status was.
        return await asyncio.to_thread(self._push_in_thread, messages)

    def _push_in_thread(self, messages: Sequence[bytes]) -> tuple[KvrelayError | None, tuple[str, ...]]:
        answers: list[str] = []
        try:
            for answer in self._call(iter(messages), timeout=WAIT_S):
                answers.append(str(pb.PushResponse.FromString(answer).WhichOneof("message")))  # noqa: PERF401 - kept on failure
        except grpc.RpcError as failure:
            return error_of_rpc(failure), tuple(answers)
        return None, tuple(answers)


class _Stream:
    """What a receiver uses of a call's context."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._messages = iter(messages)
        self.answers: list[str] = []

    async def read(self) -> Any:
        return next(self._messages, grpc.aio.EOF)

    async def write(self, response: pb.PushResponse) -> None:
        self.answers.append(str(response.WhichOneof("message")))


@asynccontextmanager
async def running_receiver() -> AsyncIterator[ReceiverBench]:
    """Serves until left."""
    threads = ThreadPoolExecutor(2)
    server = create_server()
    memory = RegionServer()
    memory.start()
    bound = bind_server(server, "127.0.0.1", 0, ())
    address = f"127.0.0.1:{bound.port}"
    with create_sync_channel(address) as channel:
        bench = ReceiverBench(address, channel, None, memory)  # type: ignore[arg-type]  # set below
        context = ReceiverContext(bench.pool, MODEL, bench.grants, threads, bench.ended.append, memory)
        bench.receiver = KVReceiver(context)
        bench.receiver.add_to(server)
        await server.start()
        try:
            yield bench
        finally:
            await server.stop(None)
            memory.close()
            threads.shutdown()


class _RecordingChannel:
    """Stands in for the connection of a sender: keeps what is sent, and accepts all of it at the
    end.
    """

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._ended = asyncio.Event()

    def stream_stream(self, method: str, **serializers: Any) -> Any:
        return lambda **options: self

    async def write(self, message: bytes) -> None:
        self.messages.append(message)
        if isinstance(request := decode_request(message), pb.PushRequest) and request.HasField("end"):
            self._ended.set()

    async def __aiter__(self) -> AsyncIterator[pb.PushResponse]:
        await self._ended.wait()
        chunks = [request for request in map(decode_request, self.messages) if isinstance(request, Chunk | SharedChunk)]
        last = chunks[-1].span
        yield pb.PushResponse(
            chunk_accepted=pb.ChunkAccepted(layer_begin=last.layer_begin, token_begin=last.token_begin)
        )
        yield pb.PushResponse(complete=pb.PushComplete(kv_bytes=sum(chunk.span.num_bytes(LAYOUT) for chunk in chunks)))

    def add_done_callback(self, callback: Any) -> None:
        """It never ends."""

    def cancel(self) -> None:
        """Nothing is open."""


@dataclass
class _CapturingTransport:
    """Opens pushes whose messages are kept."""

    channel: _RecordingChannel
    client: RegionClient | None
    region: SharedRegion | None = None

    async def open(self, address: str, plan: PushPlan) -> Any:
        push = GrpcPush(self.channel, CHUNK_BYTES)  # type: ignore[arg-type]
        if self.client is None:
            await push.send_header(plan)
            return push
        self.region = await self.client.lease()
        assert self.region is not None
        await push.send_header(plan, self.region.region_id)
        return SharedMemoryPush(push, self, self.region)  # type: ignore[arg-type]  # what it uses of a client

    def release(self, region: SharedRegion) -> None:
        """The region stays with the captured push."""

    async def close(self) -> None:
        """Nothing is open."""


async def capture_push(seed: int, reservation: Reservation, client: RegionClient | None = None) -> CapturedPush:
    """Has a prefill worker's sender push KV that is made from the seed.

    Args:
        seed: of the KV.
        reservation: where it would go.
        client: how payloads get into shared memory; None leaves them in their messages.
    """
    source = PagedKVCache(LAYOUT, NUM_BLOCKS, BLOCK_SIZE)
    kv = random.Random(seed).randbytes(LAYOUT.num_layers * CHUNK_BYTES)
    source.import_kv(kv, KVSpan(0, LAYOUT.num_layers, 0, NUM_TOKENS), (5, 0, 7))
    transport = _CapturingTransport(_RecordingChannel(), client)
    outcomes: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def on_ended(job_id: JobId, outcome: object) -> None:
        loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

    with ThreadPoolExecutor(1) as threads:
        context = SenderContext(source, LAYOUT, transport, threads, CHUNK_BYTES, 1 << 20)
        job = reservation.job
        plan = PushPlan(job.job_id, reservation.ticket, MODEL.fingerprint, 0, NUM_TOKENS)
        sender = KVSender(context, "nowhere", plan, (5, 0, 7), on_ended)
        sender.announce_cached(NUM_TOKENS)
        sender.finish([SequenceToken(job.job_id, 0, 0, Token(seed % MODEL.vocab_size))])
        async with asyncio.timeout(WAIT_S):
            outcome = await outcomes.get()
    assert isinstance(outcome, TransferResult), outcome
    messages = tuple(transport.channel.messages)
    assert len(messages) == LAYOUT.num_layers + 2
    return CapturedPush(reservation, messages, kv, transport.region)


def make_reservation(number: int, ticket: bytes, attempt: int = 1) -> Reservation:
    """One of several that have no block in common."""
    first = 3 * number + 1
    job = make_job(list(range(NUM_TOKENS)), 8, request_id=f"{number:032x}", attempt=attempt)
    return Reservation(job, (first + 2, first, first + 1), ticket)


def num_descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def open_descriptors() -> Counter[str]:
    """What the descriptors of this process are, by kind: files by path, sockets and others by their
    type.
    """
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            kinds[os.readlink(f"/proc/self/fd/{number}").split(":[")[0]] += 1
    return kinds
