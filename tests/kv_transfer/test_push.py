"""Sender and receiver over real gRPC, without models: what is corrupt, swapped, replayed, foreign
or cut is refused.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import pytest

from decode_worker import kv_receiver
from decode_worker.commands import PushEnded
from decode_worker.kv_receiver import KVReceiver, ReceiverContext
from decode_worker.receiving.write_grants import WriteGrants
from kvrelay.core.job import Job, JobId, SequenceToken, Token
from kvrelay.core.model_spec import WIRE_VERSION, KVLayout, ModelSpec
from kvrelay.errors import DeadlineError, TransferError
from kvrelay.kv_transfer import transports
from kvrelay.kv_transfer.codec import Chunk, chunk_digest, encode_chunk, end_digest
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.shared_memory_transport import SharedMemoryTransport
from kvrelay.kv_transfer.shm_fd_passing import RegionServer
from kvrelay.kv_transfer.transports import GrpcPush, GrpcTransport, PushComplete, PushPlan
from kvrelay.network.rpc import bind_server, create_channel, create_server
from kvrelay.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc
from kvrelay.wire.convert import job_id_to_pb, sequence_token_to_pb
from prefill_worker.kv_sender import KVSender, SenderContext, TransferResult
from tests.support.jobs import make_job

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32")
MODEL = ModelSpec("m", "llama", LAYOUT, 100, 512, (0,), "fingerprint")
NUM_TOKENS = 20
MESSAGE_BYTES = 10 * LAYOUT.bytes_per_layer_token
REGION_BYTES = 4 * MESSAGE_BYTES
WAIT_S = 30.0


class FakePool:
    """KV by layer and token, in both directions. Numbers stand for bytes."""

    def __init__(self, seed: int | None = None) -> None:
        shape = (LAYOUT.num_layers, NUM_TOKENS, LAYOUT.bytes_per_layer_token)
        generator = np.random.default_rng(seed)
        self.content = generator.integers(0, 256, shape, np.uint8) if seed is not None else np.zeros(shape, np.uint8)
        self.num_imports = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def export_kv(self, buffer: memoryview, span: KVSpan, block_ids: Sequence[int]) -> None:
        self._pass_gate()
        buffer[:] = self._part(span).tobytes()

    def import_kv(self, payload: memoryview | bytes, span: KVSpan, block_ids: Sequence[int]) -> None:
        self._pass_gate()
        part = self._part(span)
        part[:] = np.frombuffer(payload, np.uint8).reshape(part.shape)
        self.num_imports += 1

    def _part(self, span: KVSpan) -> np.ndarray:
        return self.content[span.layer_begin : span.layer_end, span.token_begin : span.token_end]

    def _pass_gate(self) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT_S), "the test never opened the gate"


@dataclass
class Bench:
    """A receiver that listens, with one reservation."""

    address: str
    grants: WriteGrants
    receiver: KVReceiver
    pool: FakePool
    job: Job
    ticket: bytes
    ended: asyncio.Queue[PushEnded]
    threads: ThreadPoolExecutor
    transport: Any
    memory: RegionServer
    outcomes: asyncio.Queue[TransferResult | TransferError] = field(default_factory=asyncio.Queue)

    def plan(self, **changes: Any) -> PushPlan:
        return replace(PushPlan(self.job.job_id, self.ticket, MODEL.fingerprint, 0, NUM_TOKENS), **changes)

    def tokens(self) -> list[SequenceToken]:
        return [SequenceToken(self.job.job_id, 0, 0, Token(9))]

    def send(self, pool: FakePool, transport: Any = None, **changes: Any) -> KVSender:
        """A sender of everything, message by message of one layer's 10 tokens."""
        loop = asyncio.get_running_loop()
        context = SenderContext(pool, LAYOUT, transport or self.transport, self.threads, MESSAGE_BYTES, 1 << 20)

        def on_ended(job_id: JobId, outcome: TransferResult | TransferError) -> None:
            loop.call_soon_threadsafe(self.outcomes.put_nowait, outcome)

        return KVSender(context, self.address, self.plan(**changes), (0,), on_ended)

    async def outcome(self) -> TransferResult | TransferError:
        async with asyncio.timeout(WAIT_S):
            return await self.outcomes.get()

    async def end_at_receiver(self) -> PushEnded:
        async with asyncio.timeout(WAIT_S):
            return await self.ended.get()

    def chunk(self, span: KVSpan, payload: bytes | None = None, attempt: int = 1, ticket: bytes | None = None) -> Chunk:
        payload = bytes(span.num_bytes(LAYOUT)) if payload is None else payload
        return Chunk(span, payload, chunk_digest(ticket or self.ticket, attempt, span, payload))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """With gRPC alone."""
    async with running_bench() as running:
        yield running


@pytest.fixture(params=["grpc", "shared-memory"])
async def any_bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """With each transport."""
    async with running_bench() as running:
        if request.param == "shared-memory":
            running.transport = SharedMemoryTransport(running.transport, REGION_BYTES, is_required=True)
        yield running
        await running.transport.close()


@asynccontextmanager
async def running_bench() -> AsyncIterator[Bench]:
    job = make_job(list(range(NUM_TOKENS)), max_tokens=8)
    grants, pool, threads = WriteGrants(), FakePool(), ThreadPoolExecutor(2)
    ended: asyncio.Queue[PushEnded] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def submit(command: PushEnded) -> None:
        loop.call_soon_threadsafe(ended.put_nowait, command)

    server = create_server()
    memory = RegionServer()
    memory.start()
    receiver = KVReceiver(ReceiverContext(pool, MODEL, grants, threads, submit, memory))
    receiver.add_to(server)
    bound = bind_server(server, "127.0.0.1", 0, ())
    await server.start()
    transport = GrpcTransport(20_000, MESSAGE_BYTES)
    ticket = grants.grant(job, (0,), 0)
    try:
        yield Bench(f"127.0.0.1:{bound.port}", grants, receiver, pool, job, ticket, ended, threads, transport, memory)
    finally:
        pool.gate.set()
        await transport.close()
        await server.stop(None)
        memory.close()
        threads.shutdown()


async def push_raw(
    bench: Bench, plan: PushPlan, messages: Sequence[bytes], region_id: bytes = b""
) -> tuple[list[str], grpc.StatusCode]:
    """Sends what a test made up; returns the names of the answers, and the status."""
    channel = create_channel(bench.address)
    push = GrpcPush(channel, MESSAGE_BYTES)
    try:
        await push.send_header(plan, region_id)
        for message in messages:
            await push.send_chunk(message)
        await push._call.done_writing()
    except TransferError:
        pass  # the receiver had enough; its status says why
    names: list[str] = []
    try:
        async with asyncio.timeout(WAIT_S):
            async for response in push._call:
                names.append(response.WhichOneof("message"))  # noqa: PERF401 - kept when the call fails
    except grpc.aio.AioRpcError:
        pass
    code = await push._call.code()
    await channel.close()
    return names, code


def end_message(bench: Bench, num_chunks: int, **changes: Any) -> bytes:
    tokens = [replace(token, **changes) for token in bench.tokens()]
    digest = end_digest(bench.ticket, bench.job.job_id.attempt, num_chunks, tokens)
    end = kv_transfer_pb2.PushEnd(num_chunks=num_chunks, tokens=map(sequence_token_to_pb, tokens), digest=digest)
    return kv_transfer_pb2.PushRequest(end=end).SerializeToString()


def any_bench_name(any_bench: Bench) -> str:
    return "grpc" if isinstance(any_bench.transport, GrpcTransport) else "shared-memory"


WHOLE = KVSpan(0, 3, 0, NUM_TOKENS)


async def test_everything_arrives_as_it_was_and_is_measured(any_bench: Bench) -> None:
    source = FakePool(seed=1)
    sender = any_bench.send(source)
    sender.announce_cached(5)
    for begin, end in ((5, 15), (15, NUM_TOKENS)):
        for layer in range(LAYOUT.num_layers):
            sender.announce(layer, begin, end)
    sender.finish(any_bench.tokens())
    outcome = await any_bench.outcome()
    assert isinstance(outcome, TransferResult)
    assert outcome.kv_bytes == LAYOUT.bytes_per_token * NUM_TOKENS
    assert outcome.num_resent_chunks == 0
    assert outcome.transport == any_bench_name(any_bench)
    ended = await any_bench.end_at_receiver()
    assert ended == PushEnded(
        any_bench.job.job_id, tuple(any_bench.tokens()), outcome.kv_bytes, NUM_TOKENS, ended.problem
    )
    assert (any_bench.pool.content == source.content).all()
    assert len(any_bench.grants) == 0


async def test_chunks_travel_before_the_pass_has_ended(any_bench: Bench) -> None:
    sender = any_bench.send(FakePool(seed=1))
    for layer in range(LAYOUT.num_layers):
        sender.announce(layer, 0, 10)
    async with asyncio.timeout(WAIT_S):
        while any_bench.pool.num_imports < LAYOUT.num_layers:  # noqa: ASYNC110 - counted in another thread
            await asyncio.sleep(0.005)
    assert any_bench.outcomes.empty()
    sender.cancel()
    assert isinstance(await any_bench.outcome(), TransferError)
    assert (await any_bench.end_at_receiver()).first_tokens is None


class TamperingTransport:
    """Changes chunks on their way: `tamper(chunk, how many came before)`."""

    def __init__(self, transport: Any, tamper: Callable[[Chunk, int], Chunk]) -> None:
        self.transport = transport
        self.tamper = tamper
        self.num_chunks = 0

    async def open(self, address: str, plan: PushPlan) -> Any:
        push = await self.transport.open(address, plan)
        encode_untouched = push.encode

        def encode(chunk: Chunk) -> Any:
            self.num_chunks += 1
            return encode_untouched(self.tamper(chunk, self.num_chunks - 1))

        push.encode = encode
        return push

    async def close(self) -> None:
        """Closed by the bench."""


class BrokenTransport(TamperingTransport):
    """The second chunk cannot be written, while answers are on their way: all of them are read."""

    def __init__(self, transport: Any) -> None:
        super().__init__(transport, lambda chunk, number: chunk)
        self.is_read_to_its_end = False

    async def open(self, address: str, plan: PushPlan) -> Any:
        push = await super().open(address, plan)
        replies, send_chunk = push.replies, push.send_chunk
        is_broken = asyncio.Event()

        async def send(encoded: Any) -> None:
            if is_broken.is_set():
                raise TransferError("the call has ended")
            is_broken.set()
            await send_chunk(encoded)

        async def replies_that_are_late() -> AsyncIterator[Any]:
            await is_broken.wait()
            await asyncio.sleep(0.02)
            yield await anext(replies())
            self.is_read_to_its_end = True

        push.send_chunk, push.replies = send, replies_that_are_late
        return push


def flip(chunk: Chunk) -> Chunk:
    """Changes a bit, in place where the payload lies in memory of the push."""
    payload = chunk.payload if isinstance(chunk.payload, memoryview) else memoryview(bytearray(chunk.payload))
    payload[len(payload) // 2] ^= 1
    return replace(chunk, payload=payload)


async def test_a_corrupt_chunk_is_sent_once_more(any_bench: Bench) -> None:
    source = FakePool(seed=2)
    transport = TamperingTransport(any_bench.transport, lambda chunk, number: flip(chunk) if number == 1 else chunk)
    sender = any_bench.send(source, transport)
    sender.announce_cached(NUM_TOKENS)
    sender.finish(any_bench.tokens())
    outcome = await any_bench.outcome()
    assert isinstance(outcome, TransferResult)
    assert outcome.num_resent_chunks == 1
    assert outcome.kv_bytes == LAYOUT.bytes_per_token * NUM_TOKENS
    assert (any_bench.pool.content == source.content).all()


async def test_a_chunk_that_is_corrupt_twice_ends_the_push(any_bench: Bench) -> None:
    transport = TamperingTransport(
        any_bench.transport, lambda chunk, number: flip(chunk) if chunk.span.layer_begin == 1 else chunk
    )
    sender = any_bench.send(FakePool(seed=2), transport)
    sender.announce_cached(NUM_TOKENS)
    sender.finish(any_bench.tokens())
    assert isinstance(await any_bench.outcome(), TransferError)
    assert (await any_bench.end_at_receiver()).first_tokens is None


@pytest.mark.parametrize(
    "tamper",
    [
        pytest.param(lambda bench, chunk: flip(chunk), id="payload"),
        pytest.param(lambda bench, chunk: bench.chunk(chunk.span, attempt=2), id="another attempt"),
        pytest.param(lambda bench, chunk: bench.chunk(chunk.span, ticket=bytes(16)), id="another ticket"),
        pytest.param(lambda bench, chunk: replace(chunk, payload=bytes(chunk.payload)[:-1]), id="truncated"),
        pytest.param(
            lambda bench, chunk: bench.chunk(replace(chunk.span, token_end=NUM_TOKENS + 1)), id="tokens out of range"
        ),
        pytest.param(lambda bench, chunk: bench.chunk(replace(chunk.span, layer_end=4)), id="layers out of range"),
        pytest.param(lambda bench, chunk: replace(chunk, span=KVSpan(1, 2, 0, 10)), id="swapped"),
        pytest.param(lambda bench, chunk: bench.chunk(KVSpan(0, 1, 5, 5), b""), id="empty"),
        pytest.param(lambda bench, chunk: replace(chunk, digest=b""), id="no digest"),
    ],
)
async def test_a_wrong_chunk_is_refused_and_not_written(bench: Bench, tamper: Callable[[Bench, Chunk], Chunk]) -> None:
    good = bench.chunk(KVSpan(0, 1, 0, 10), bytes([7]) * 10 * LAYOUT.bytes_per_layer_token)
    names, code = await push_raw(bench, bench.plan(), [encode_chunk(tamper(bench, good))])
    assert names == ["chunk_refused"]
    assert code is grpc.StatusCode.DATA_LOSS
    assert bench.pool.num_imports == 0
    assert (await bench.end_at_receiver()).first_tokens is None


async def test_a_replayed_chunk_is_refused(bench: Bench) -> None:
    chunk = encode_chunk(bench.chunk(KVSpan(0, 1, 0, 10)))
    names, code = await push_raw(bench, bench.plan(), [chunk, chunk])
    assert names == ["chunk_accepted", "chunk_refused"]
    assert code is grpc.StatusCode.DATA_LOSS
    assert bench.pool.num_imports == 1


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ticket": bytes(16)}, grpc.StatusCode.PERMISSION_DENIED),
        ({"job_id": JobId("b" * 32, 1)}, grpc.StatusCode.PERMISSION_DENIED),
        ({"job_id": JobId("a" * 32, 2)}, grpc.StatusCode.PERMISSION_DENIED),
        ({"fingerprint": "other"}, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_a_header_without_the_right_leaves_the_reservation_as_it_is(
    bench: Bench, changes: dict[str, Any], code: grpc.StatusCode
) -> None:
    assert await push_raw(bench, bench.plan(**changes), []) == ([], code)
    assert bench.ended.empty()
    names, right = await push_raw(bench, bench.plan(), [encode_chunk(bench.chunk(WHOLE)), end_message(bench, 1)])
    assert (names, right) == (["chunk_accepted", "complete"], grpc.StatusCode.OK)


async def test_a_ticket_is_good_for_one_push(bench: Bench) -> None:
    messages = [encode_chunk(bench.chunk(WHOLE)), end_message(bench, 1)]
    assert (await push_raw(bench, bench.plan(), messages))[1] is grpc.StatusCode.OK
    assert await push_raw(bench, bench.plan(), []) == ([], grpc.StatusCode.PERMISSION_DENIED)


@pytest.mark.parametrize("version", [0, WIRE_VERSION - 1, WIRE_VERSION + 1])
async def test_another_wire_version_is_refused(bench: Bench, version: int) -> None:
    stub = kv_transfer_pb2_grpc.KVTransferServiceStub(channel := create_channel(bench.address))
    header = kv_transfer_pb2.PushHeader(
        job_id=job_id_to_pb(bench.job.job_id), ticket=bench.ticket, fingerprint="fingerprint", wire_version=version
    )
    call: Any = stub.Push(iter([kv_transfer_pb2.PushRequest(header=header)]))
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
    await channel.close()


async def test_a_push_that_says_nothing_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_receiver, "HEADER_TIMEOUT_S", 0.05)
    async with create_channel(bench.address) as channel:
        call: Any = kv_transfer_pb2_grpc.KVTransferServiceStub(channel).Push()
        assert await asyncio.wait_for(call.code(), WAIT_S) is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_header_with_a_long_id_is_refused_before_anything_is_looked_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.grants, "start_write", lambda *_: pytest.fail("looked up"))
    plan = bench.plan(job_id=JobId("a" * 129, 1))
    assert await push_raw(bench, plan, []) == ([], grpc.StatusCode.INVALID_ARGUMENT)


async def test_an_end_with_tokens_of_more_sequences_than_there_are_ends_the_push(bench: Bench) -> None:
    tokens = [*bench.tokens(), SequenceToken(bench.job.job_id, 1, 0, Token(9))]
    digest = end_digest(bench.ticket, bench.job.job_id.attempt, 1, tokens)
    end = kv_transfer_pb2.PushEnd(num_chunks=1, tokens=map(sequence_token_to_pb, tokens), digest=digest)
    message = kv_transfer_pb2.PushRequest(end=end).SerializeToString()
    names, code = await push_raw(bench, bench.plan(), [encode_chunk(bench.chunk(WHOLE)), message])
    assert (names, code) == (["chunk_accepted"], grpc.StatusCode.DATA_LOSS)


async def test_an_end_of_another_ticket_ends_the_push(bench: Bench) -> None:
    digest = end_digest(bytes(16), bench.job.job_id.attempt, 1, bench.tokens())
    end = kv_transfer_pb2.PushEnd(num_chunks=1, tokens=map(sequence_token_to_pb, bench.tokens()), digest=digest)
    message = kv_transfer_pb2.PushRequest(end=end).SerializeToString()
    names, code = await push_raw(bench, bench.plan(), [encode_chunk(bench.chunk(WHOLE)), message])
    assert (names, code) == (["chunk_accepted"], grpc.StatusCode.DATA_LOSS)


@pytest.mark.parametrize("changes", [{"token_begin": 4}, {"token_end": NUM_TOKENS - 1}])
async def test_another_range_than_the_reservation_s_ends_the_push(bench: Bench, changes: dict[str, Any]) -> None:
    messages = [encode_chunk(bench.chunk(WHOLE)), end_message(bench, 1)]
    assert await push_raw(bench, bench.plan(**changes), messages) == ([], grpc.StatusCode.DATA_LOSS)
    assert (await bench.end_at_receiver()).first_tokens is None


@pytest.mark.parametrize(
    "changes", [{"index": 1}, {"sequence": 1}, {"job_id": JobId("b" * 32, 1)}, {"token": Token(100)}], ids=str
)
async def test_wrong_first_tokens_end_the_push(bench: Bench, changes: dict[str, Any]) -> None:
    messages = [encode_chunk(bench.chunk(WHOLE)), end_message(bench, 1, **changes)]
    names, code = await push_raw(bench, bench.plan(), messages)
    assert (names, code) == (["chunk_accepted"], grpc.StatusCode.DATA_LOSS)


async def test_an_end_with_a_part_missing_ends_the_push(bench: Bench) -> None:
    part = encode_chunk(bench.chunk(KVSpan(0, 3, 0, NUM_TOKENS - 1)))
    names, code = await push_raw(bench, bench.plan(), [part, end_message(bench, 1)])
    assert (names, code) == (["chunk_accepted"], grpc.StatusCode.DATA_LOSS)
    assert (await bench.end_at_receiver()).first_tokens is None


async def test_the_receiver_frees_after_the_write_when_the_sender_disconnects(any_bench: Bench) -> None:
    any_bench.pool.gate.clear()
    sender = any_bench.send(FakePool(seed=1))
    sender.announce_cached(NUM_TOKENS)
    assert await asyncio.to_thread(any_bench.pool.entered.wait, WAIT_S)
    sender.cancel()
    await any_bench.outcome()
    assert not any_bench.grants.revoke(any_bench.job.job_id)
    assert any_bench.ended.empty()
    any_bench.pool.gate.set()
    assert (await any_bench.end_at_receiver()).first_tokens is None
    assert any_bench.grants.revoke(any_bench.job.job_id)


async def test_a_reservation_that_ends_breaks_the_push_off(any_bench: Bench) -> None:
    sender = any_bench.send(FakePool(seed=1))
    for layer in range(LAYOUT.num_layers):
        sender.announce(layer, 0, 10)
    assert await asyncio.to_thread(any_bench.pool.entered.wait, WAIT_S)
    assert not any_bench.grants.revoke(any_bench.job.job_id)
    assert (await any_bench.end_at_receiver()).first_tokens is None
    assert isinstance(await any_bench.outcome(), TransferError)


class UnreadStream:
    """The receiver's side of a push whose sender does not read: an answer is never taken."""

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._requests = list(messages)
        self.writes = asyncio.Event()

    async def read(self) -> bytes:
        if not self._requests:
            await asyncio.Event().wait()
        return self._requests.pop(0)

    async def write(self, response: kv_transfer_pb2.PushResponse) -> None:
        self.writes.set()
        await asyncio.Event().wait()


async def test_a_sender_that_takes_no_answer_keeps_its_blocks_for_a_bounded_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_receiver, "ANSWER_TIMEOUT_S", 0.05)
    header = kv_transfer_pb2.PushHeader(
        job_id=job_id_to_pb(bench.job.job_id),
        ticket=bench.ticket,
        fingerprint=MODEL.fingerprint,
        wire_version=WIRE_VERSION,
        token_end=NUM_TOKENS,
    )
    chunk = encode_chunk(bench.chunk(KVSpan(0, 1, 0, 10)))
    stream = UnreadStream([kv_transfer_pb2.PushRequest(header=header).SerializeToString(), chunk])
    push = asyncio.create_task(bench.receiver.Push(None, stream))  # type: ignore[arg-type]
    async with asyncio.timeout(WAIT_S):
        await stream.writes.wait()
    assert not bench.grants.revoke(bench.job.job_id)
    assert (await bench.end_at_receiver()).first_tokens is None
    with pytest.raises(DeadlineError):
        await asyncio.wait_for(push, WAIT_S)


async def test_a_stopped_sender_ends_only_after_its_export(any_bench: Bench) -> None:
    source = FakePool(seed=1)
    source.gate.clear()
    sender = any_bench.send(source)
    sender.announce_cached(NUM_TOKENS)
    assert await asyncio.to_thread(source.entered.wait, WAIT_S)
    async with asyncio.timeout(WAIT_S):
        while any_bench.grants._grants[any_bench.job.job_id]._on_revoked is None:  # noqa: ASYNC110 - the header is on its way
            await asyncio.sleep(0.005)
    sender.cancel()
    # the receiver knows before the export has ended
    assert (await any_bench.end_at_receiver()).first_tokens is None
    assert any_bench.outcomes.empty()
    source.gate.set()
    assert isinstance(await any_bench.outcome(), TransferError)


async def test_answers_are_read_to_their_end_when_a_chunk_cannot_be_written(any_bench: Bench) -> None:
    transport = BrokenTransport(any_bench.transport)
    any_bench.send(FakePool(seed=1), transport).announce_cached(NUM_TOKENS)
    outcome = await any_bench.outcome()
    assert isinstance(outcome, TransferError)
    assert outcome.message == "the call has ended"
    assert transport.is_read_to_its_end
    assert (await any_bench.end_at_receiver()).first_tokens is None


async def test_a_sender_that_is_stopped_before_its_first_turn_ends_too(any_bench: Bench) -> None:
    any_bench.send(FakePool(seed=1)).cancel()
    assert isinstance(await any_bench.outcome(), TransferError)


async def test_a_sender_that_is_stopped_while_it_waits_leaves_no_task(bench: Bench) -> None:
    tasks_before = asyncio.all_tasks()
    sender = bench.send(FakePool(seed=1))
    sender.announce_cached(NUM_TOKENS)
    async with asyncio.timeout(WAIT_S):
        while bench.pool.num_imports < 2 * LAYOUT.num_layers:  # noqa: ASYNC110 - counted in another thread
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)  # for the last answer: it waits for its first tokens now
    sender.cancel()
    await bench.outcome()
    await bench.end_at_receiver()
    waiting = [task for task in asyncio.all_tasks() - tasks_before if "Event.wait" in repr(task.get_coro())]
    assert not waiting


async def test_a_receiver_that_is_not_there_fails_the_push_in_time(bench: Bench) -> None:
    transport = GrpcTransport(connect_timeout_ms=200)
    bench.address = "127.0.0.1:1"
    bench.send(FakePool(seed=1), transport)
    outcome = await bench.outcome()
    assert isinstance(outcome, TransferError)
    assert "not reached" in outcome.message
    await transport.close()


async def test_a_connection_that_is_dropped_for_others_lives_as_long_as_its_push(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "MAX_CHANNELS", 1)
    push = await bench.transport.open(bench.address, bench.plan())
    # With a ticket of its own: whose request arrives first is nobody's choice.
    other = await bench.transport.open(bench.address.replace("127.0.0.1", "localhost"), bench.plan(ticket=b"another"))
    assert list(bench.transport._channels) == [bench.address.replace("127.0.0.1", "localhost")]
    await push.send_chunk(encode_chunk(bench.chunk(WHOLE)))
    await push.send_end(1, bench.tokens())
    async with asyncio.timeout(WAIT_S):
        replies = [reply async for reply in push.replies()]
    assert replies[-1] == PushComplete(LAYOUT.bytes_per_token * NUM_TOKENS)
    other.close(is_complete=False)


async def test_a_receiver_that_is_not_reached_fails_each_push_in_its_own_time(bench: Bench) -> None:
    transport = GrpcTransport(connect_timeout_ms=300)
    first = asyncio.create_task(transport.open("127.0.0.1:1", bench.plan()))
    await asyncio.sleep(0.2)
    second = asyncio.create_task(transport.open("127.0.0.1:1", bench.plan()))
    for push in (first, second):
        with pytest.raises(TransferError, match="not reached"):
            await asyncio.wait_for(push, WAIT_S)
    assert not transport._channels
    await transport.close()


async def test_a_closed_transport_opens_nothing_and_has_closed_what_it_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "MAX_CHANNELS", 1)
    push = await bench.transport.open(bench.address, bench.plan())
    other = await bench.transport.open(bench.address.replace("127.0.0.1", "localhost"), bench.plan())
    await bench.transport.close()
    assert push._call.done()
    assert other._call.done()
    with pytest.raises(TransferError, match="shutting down"):
        await bench.transport.open(bench.address, bench.plan())
    assert not bench.transport._channels


async def test_the_window_bounds_what_is_not_acknowledged(bench: Bench) -> None:
    bench.pool.gate.clear()
    chunk_bytes = 5 * LAYOUT.bytes_per_layer_token
    grpc_transport = GrpcTransport(20_000, chunk_bytes)
    transport = TamperingTransport(grpc_transport, lambda chunk, number: chunk)
    loop = asyncio.get_running_loop()
    context = SenderContext(FakePool(1), LAYOUT, transport, bench.threads, chunk_bytes, 2 * chunk_bytes)

    def on_ended(job_id: JobId, outcome: TransferResult | TransferError) -> None:
        loop.call_soon_threadsafe(bench.outcomes.put_nowait, outcome)

    sender = KVSender(context, bench.address, bench.plan(), (0,), on_ended)
    sender.announce_cached(NUM_TOKENS)
    sender.finish(bench.tokens())
    assert await asyncio.to_thread(bench.pool.entered.wait, WAIT_S)
    async with asyncio.timeout(WAIT_S):
        while transport.num_chunks < 2:  # noqa: ASYNC110 - counted in another thread
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)  # a third chunk would have been made by now
    assert transport.num_chunks == 2
    bench.pool.gate.set()
    outcome = await bench.outcome()
    assert isinstance(outcome, TransferResult)
    assert transport.num_chunks == 12
    await grpc_transport.close()
