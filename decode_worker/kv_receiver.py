"""Where the KV cache arrives at the decode worker: checks a push, writes it into its reservation, hands it to the engine.

    header   ticket, attempt, fingerprint, wire version, range          before anything is written
    chunk    range within the reservation, size, digest                 before it is written; else it is refused
    end      digest, nothing missing, a first token for every sequence  before the sequences may run

A payload is in its message, or in a region of shared memory that the push has for itself. Every size comes from the receiver's
own model. Runs on the event loop; digests and writes run in threads, while the next messages are read.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import hmac
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from decode_worker.commands import PushEnded
from decode_worker.push_inbox import PushInbox
from decode_worker.push_permits import PushPermit, PushPermits
from decode_worker.transfer_assembly import TransferAssembly
from kvrelay.errors import DeadlineError, FingerprintError, KvrelayError, TransferError
from kvrelay.fault_points import fault_point
from kvrelay.kv_transfer.codec import Chunk, SharedChunk, chunk_digest, decode_request, end_digest
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.memory_handover import HandoverServer
from kvrelay.kv_transfer.pool import KVImporter
from kvrelay.kv_transfer.shared_memory import SharedRegion
from kvrelay.model_spec import WIRE_VERSION, ModelSpec
from kvrelay.trace_context import current_trace
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire import sequence_token_from_pb, work_id_from_pb
from kvrelay.work import SequenceToken, Work
from kvrelay.work_traces import WorkTraces

HEADER_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 2.0
"""Answers are so small that one waits only behind thousands that were not read."""

MAX_WRITE_BYTES = 2 * 1024 * 1024
"""Written in one turn of a thread, and one chunk more."""
SERVICE_NAME = "kvrelay.v1.KVTransferService"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReceiverContext:
    """What all pushes to a worker share."""

    importer: KVImporter
    model: ModelSpec
    permits: PushPermits
    threads: Executor
    """Where digests are computed and KV is written."""
    submit: Callable[[PushEnded], None]
    """To the engine; called in any thread."""
    shared_memory: HandoverServer | None = None
    """Regions that were handed over; None when none are taken."""
    traces: WorkTraces = field(default_factory=WorkTraces)


class KVReceiver:
    """Serves pushes."""

    def __init__(self, context: ReceiverContext) -> None:
        self._context = context

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the service. Requests of Push stay as their bytes, for reading them as messages would copy every payload."""
        handlers = {
            "Push": grpc.stream_stream_rpc_method_handler(
                self.Push, response_serializer=kv_transfer_pb2.PushResponse.SerializeToString
            ),
            "OfferSharedMemory": grpc.unary_unary_rpc_method_handler(
                self.OfferSharedMemory,
                request_deserializer=kv_transfer_pb2.OfferSharedMemoryRequest.FromString,
                response_serializer=kv_transfer_pb2.OfferSharedMemoryResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    async def OfferSharedMemory(
        self, request: kv_transfer_pb2.OfferSharedMemoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> kv_transfer_pb2.OfferSharedMemoryResponse:
        """Where regions are taken."""
        memory = self._context.shared_memory
        if memory is None or not memory.is_listening:
            return kv_transfer_pb2.OfferSharedMemoryResponse()
        offer = memory.offer
        return kv_transfer_pb2.OfferSharedMemoryResponse(
            socket_name=offer.socket_name,
            key=offer.key,
            max_region_bytes=offer.max_region_bytes,
            max_regions=offer.max_regions,
        )

    async def Push(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Receives one work's KV. A coroutine that reads and writes through the context: it waits for two things at once."""
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                header = _expect_header(await context.read())
        except TimeoutError:
            raise DeadlineError(f"no header came within {HEADER_TIMEOUT_S:g} s") from None
        self._check_header(header)
        inbox = PushInbox(context)
        loop = asyncio.get_running_loop()

        def on_close() -> None:
            loop.call_soon_threadsafe(inbox.close)

        permit = self._context.permits.begin(work_id_from_pb(header.work_id), header.ticket, on_close)
        fault_point("decode.push_begun", permit.work)
        reading = loop.create_task(inbox.read(), name="push messages")
        try:
            await _IncomingPush(self._context, permit, inbox, context).receive(header)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _check_header(self, header: kv_transfer_pb2.PushHeader) -> None:
        if header.wire_version != WIRE_VERSION:
            raise FingerprintError(f"the push has wire version {header.wire_version}; this worker reads {WIRE_VERSION}")
        if header.fingerprint != self._context.model.fingerprint:
            raise FingerprintError("the push comes from another model, or from the same one served differently")


class _IncomingPush:
    """One push into one reservation, from its header to its end."""

    def __init__(self, context: ReceiverContext, permit: PushPermit, inbox: PushInbox, stream: Any) -> None:
        self._context = context
        self._permit = permit
        self._inbox = inbox
        self._stream = stream
        self._assembly = TransferAssembly(context.model.kv_layout, permit.token_begin, permit.token_end)
        self._region: SharedRegion | None = None
        self._first_tokens: tuple[SequenceToken, ...] | None = None
        self._num_sent_chunks = 0
        self._answers: deque[kv_transfer_pb2.PushResponse] = deque()
        """Not sent yet."""
        self._writing: Future[list[str | None]] | None = None

    async def receive(self, header: kv_transfer_pb2.PushHeader) -> None:
        """Receives everything. Whatever happens, the engine learns of the end once no write is under way."""
        failure: KvrelayError | None = None
        is_complete = False
        began_at = time.monotonic()
        try:
            self._check_range(header)
            if header.shared_region:
                self._region = self._borrow(header.shared_region)
            while not is_complete:
                if not self._inbox.has_messages:
                    await self._send_answers()
                await self._take_messages(await self._inbox.take())
                is_complete = self._is_complete()
            fault_point("decode.push_complete", self._permit.work)
        except KvrelayError as error:
            failure = error
        finally:
            problem = "the prefill worker broke the push off" if failure is None else failure.message
            self._trace(began_at, "" if is_complete else problem)
            self._end(self._first_tokens if is_complete else None, problem)
        # The engine goes on while the sender is told.
        await self._send_answers()
        if failure is not None:
            raise failure
        complete = kv_transfer_pb2.PushComplete(kv_bytes=self._assembly.kv_bytes)
        await self._answer(kv_transfer_pb2.PushResponse(complete=complete))

    def _trace(self, began_at: float, problem: str) -> None:
        """The push as a child of the sender's span, whose ids came with the call."""
        self._context.traces.record(
            self._permit.work.work_id,
            "kv.receive",
            time.monotonic() - began_at,
            parent=current_trace(),
            kind="consumer",
            error=problem,
            attributes={"kvrelay.kv_bytes": self._assembly.kv_bytes},
        )

    def _check_range(self, header: kv_transfer_pb2.PushHeader) -> None:
        expected = (self._permit.token_begin, self._permit.token_end)
        if (header.token_begin, header.token_end) != expected:
            pushed = f"[{header.token_begin}, {header.token_end})"
            raise TransferError(f"the push is of tokens {pushed}, not [{expected[0]}, {expected[1]})")

    def _borrow(self, region_id: bytes) -> SharedRegion:
        if self._context.shared_memory is None:
            raise TransferError("this worker takes no shared memory")
        return self._context.shared_memory.lend(region_id)

    def _is_complete(self) -> bool:
        """Whether all is here.

        Raises:
            TransferError: something is missing that will not come.
        """
        if self._first_tokens is None or self._assembly.awaits_chunks:
            return False
        self._assembly.check_end(self._num_sent_chunks)
        return True

    async def _take_messages(self, messages: Sequence[bytes]) -> None:
        """Writes what can be written."""
        chunks: list[Chunk] = []
        for message in messages:
            request = decode_request(message)
            if isinstance(request, kv_transfer_pb2.PushRequest):
                await self._write(chunks)
                chunks = []
                self._take_end(request)
                continue
            chunk = self._with_payload(request)
            num_waiting_bytes = sum(memoryview(each.payload).nbytes for each in chunks)
            if num_waiting_bytes >= MAX_WRITE_BYTES or any(chunk.span.overlaps(each.span) for each in chunks):
                await self._write(chunks)
                chunks = []
            chunks.append(chunk)
        await self._write(chunks)

    def _take_end(self, request: kv_transfer_pb2.PushRequest) -> None:
        if request.WhichOneof("message") != "end" or self._first_tokens is not None:
            raise TransferError("the push has another message where a chunk or its end must come")
        tokens = tuple(sequence_token_from_pb(token) for token in request.end.tokens)
        permit, num_chunks = self._permit, request.end.num_chunks
        expected = end_digest(permit.ticket, permit.work.work_id.attempt, num_chunks, tokens)
        if not hmac.compare_digest(expected, request.end.digest):
            raise TransferError("the digest of the push's end does not match")
        _check_first_tokens(tokens, permit.work, self._context.model)
        self._first_tokens = tokens
        self._num_sent_chunks = num_chunks

    def _with_payload(self, chunk: Chunk | SharedChunk) -> Chunk:
        """A chunk in shared memory with a view of it; an empty one where the sender's range is not in the region."""
        if isinstance(chunk, Chunk):
            return chunk
        begin, end = chunk.where.offset, chunk.where.offset + chunk.where.num_bytes
        is_inside = self._region is not None and end <= self._region.num_bytes
        payload = self._region.buffer[begin:end] if self._region is not None and is_inside else b""
        return Chunk(chunk.span, payload, chunk.digest)

    async def _send_answers(self) -> None:
        while self._answers:
            await self._answer(self._answers.popleft())

    async def _answer(self, response: kv_transfer_pb2.PushResponse) -> None:
        # Bounded rather than broken off when the reservation ends: gRPC sends no status behind a write that was cancelled.
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._stream.write(response)
        except TimeoutError:
            raise DeadlineError(f"the prefill worker took no answer within {ANSWER_TIMEOUT_S:g} s") from None

    async def _write(self, chunks: Sequence[Chunk]) -> None:
        """Checks and writes chunks that do not overlap, and sends the answers to those before meanwhile."""
        if not chunks:
            return
        problems = [self._assembly.problem_with(chunk.span, memoryview(chunk.payload).nbytes) for chunk in chunks]
        good = [chunk for chunk, problem in zip(chunks, problems, strict=True) if problem is None]
        if good:
            self._writing = self._context.threads.submit(self._check_and_write, good)
            await self._send_answers()
            written = await asyncio.wrap_future(self._writing)
            self._writing = None
            of_good = iter(written)
            problems = [next(of_good) if problem is None else problem for problem in problems]
        for chunk, problem in zip(chunks, problems, strict=True):
            self._note(chunk.span, problem)

    def _note(self, span: KVSpan, problem: str | None) -> None:
        """A chunk was written or refused. One answer goes for all that are accepted in a row."""
        if problem is not None:
            _log.warning("refused a KV chunk", problem=problem, **self._permit.work.log_fields)
            self._answers.append(_refused(span, problem))
            self._assembly.refuse(span, problem)
            return
        self._assembly.add(span)
        fault_point("decode.chunk_written", self._permit.work)
        if self._answers and self._answers[-1].WhichOneof("message") == "chunk_accepted":
            self._answers.pop()
        self._answers.append(_accepted(span))

    def _check_and_write(self, chunks: Sequence[Chunk]) -> list[str | None]:
        """Runs in a thread. Why each chunk was not written, or None."""
        return [self._check_and_write_one(chunk) for chunk in chunks]

    def _check_and_write_one(self, chunk: Chunk) -> str | None:
        span, permit = chunk.span, self._permit
        fault_point("decode.chunk_write_begins", permit.work)
        expected = chunk_digest(permit.ticket, permit.work.work_id.attempt, span, chunk.payload)
        if not hmac.compare_digest(expected, chunk.digest):
            return "the digest does not match"
        assert not isinstance(chunk.payload, bytearray)
        self._context.importer.import_kv(
            chunk.payload, span.layer_begin, span.layer_end, permit.block_ids, span.token_begin, span.token_end
        )
        return None

    def _end(self, first_tokens: tuple[SequenceToken, ...] | None, problem: str) -> None:
        if self._writing is None:
            self._report(first_tokens, problem)
        else:
            # Blocks must not be freed under a write: the thread that does it reports the end.
            self._writing.add_done_callback(lambda _: self._report(None, problem))

    def _report(self, first_tokens: tuple[SequenceToken, ...] | None, problem: str) -> None:
        permit, assembly = self._permit, self._assembly
        if self._region is not None and self._context.shared_memory is not None:
            self._context.shared_memory.give_back(self._region)
        self._context.permits.end(permit)
        num_tokens = permit.token_end - permit.token_begin
        self._context.submit(PushEnded(permit.work.work_id, first_tokens, assembly.kv_bytes, num_tokens, problem))


def _expect_header(message: Any) -> kv_transfer_pb2.PushHeader:
    request = None if message is grpc.aio.EOF else decode_request(message)
    if not isinstance(request, kv_transfer_pb2.PushRequest) or request.WhichOneof("message") != "header":
        raise TransferError("the push does not begin with a header")
    return request.header


def _check_first_tokens(tokens: Sequence[SequenceToken], work: Work, model: ModelSpec) -> None:
    """Raises TransferError unless there is exactly the first token of every sequence of the work, in order."""
    said = [(token.work_id, token.sequence, token.index) for token in tokens]
    if said != [(work.work_id, number, work.first_index) for number in work.sequences]:
        raise TransferError("the push's first tokens are not those of the work's sequences")
    if any(token.token.token_id >= model.vocab_size for token in tokens):
        raise TransferError("a first token is outside of the vocabulary")


def _accepted(span: KVSpan) -> kv_transfer_pb2.PushResponse:
    accepted = kv_transfer_pb2.ChunkAccepted(layer_begin=span.layer_begin, token_begin=span.token_begin)
    return kv_transfer_pb2.PushResponse(chunk_accepted=accepted)


def _refused(span: KVSpan, problem: str) -> kv_transfer_pb2.PushResponse:
    refused = kv_transfer_pb2.ChunkRefused(layer_begin=span.layer_begin, token_begin=span.token_begin, message=problem)
    return kv_transfer_pb2.PushResponse(chunk_refused=refused)
