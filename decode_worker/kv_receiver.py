"""Where the KV cache arrives at the decode worker: checks a push, writes it into its reservation, hands it to the engine.

    header   ticket, attempt, fingerprint, wire version, range          before anything is written
    chunk    range within the reservation, size, digest                 before it is written; else it is refused
    end      nothing missing, a first token for every sequence          before the sequences may run

Every size comes from the receiver's own model. Runs on the event loop; digests and writes run in threads.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import hmac
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog

from decode_worker.commands import PushEnded
from decode_worker.push_permits import PushPermit, PushPermits
from decode_worker.transfer_assembly import TransferAssembly
from kvrelay.errors import CancelledRequestError, DeadlineError, FingerprintError, KvrelayError, TransferError
from kvrelay.kv_transfer.codec import Chunk, chunk_digest, decode_chunk
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.model_spec import WIRE_VERSION, ModelSpec
from kvrelay.v1 import kv_transfer_pb2, kv_transfer_pb2_grpc
from kvrelay.wire import sequence_token_from_pb, work_id_from_pb
from kvrelay.work import SequenceToken, Work

HEADER_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 2.0
"""Answers are so small that one waits only behind thousands that were not read."""

_log = structlog.get_logger(__name__)


class KVImporter(Protocol):
    """The pool, as far as a receiver needs it."""

    def import_kv(
        self,
        payload: memoryview | bytes,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
    ) -> None:
        """Copies K and V into the pool."""


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


class KVReceiver(kv_transfer_pb2_grpc.KVTransferServiceServicer):
    """Serves pushes."""

    def __init__(self, context: ReceiverContext) -> None:
        self._context = context

    async def Push(  # type: ignore[override]  # a coroutine that writes to the context, so that it can wait for two things at once
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                header = _expect(await context.read(), "header").header
        except TimeoutError:
            raise DeadlineError(f"no header came within {HEADER_TIMEOUT_S:g} s") from None
        self._check_header(header)
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_close() -> None:
            loop.call_soon_threadsafe(closed.set)

        permit = self._context.permits.begin(work_id_from_pb(header.work_id), header.ticket, on_close)
        await _IncomingPush(self._context, permit, closed, context).receive(header)

    def _check_header(self, header: kv_transfer_pb2.PushHeader) -> None:
        if header.wire_version != WIRE_VERSION:
            raise FingerprintError(f"the push has wire version {header.wire_version}; this worker reads {WIRE_VERSION}")
        if header.fingerprint != self._context.model.fingerprint:
            raise FingerprintError("the push comes from another model, or from the same one served differently")


class _IncomingPush:
    """One push into one reservation, from its header to its end."""

    def __init__(self, context: ReceiverContext, permit: PushPermit, closed: asyncio.Event, stream: Any) -> None:
        self._context = context
        self._permit = permit
        self._closed = closed
        self._stream = stream
        self._assembly = TransferAssembly(context.model.kv_layout, permit.token_begin, permit.token_end)
        self._writing: Future[str | None] | None = None

    async def receive(self, header: kv_transfer_pb2.PushHeader) -> None:
        """Receives everything. Whatever happens, the engine learns of the end once no write is under way."""
        problem = "the prefill worker broke the push off"
        first_tokens: tuple[SequenceToken, ...] | None = None
        try:
            self._check_range(header)
            first_tokens = await self._receive_all()
        except KvrelayError as error:
            problem = error.message
            raise
        finally:
            self._end(first_tokens, problem)
        complete = kv_transfer_pb2.PushComplete(kv_bytes=self._assembly.kv_bytes)
        await self._answer(kv_transfer_pb2.PushResponse(complete=complete))

    def _check_range(self, header: kv_transfer_pb2.PushHeader) -> None:
        expected = (self._permit.token_begin, self._permit.token_end)
        if (header.token_begin, header.token_end) != expected:
            pushed = f"[{header.token_begin}, {header.token_end})"
            raise TransferError(f"the push is of tokens {pushed}, not [{expected[0]}, {expected[1]})")

    async def _receive_all(self) -> tuple[SequenceToken, ...]:
        while (request := await self._read()) is not grpc.aio.EOF:
            if request.WhichOneof("message") == "end":
                self._assembly.check_end(request.end.num_chunks)
                tokens = tuple(sequence_token_from_pb(token) for token in request.end.tokens)
                _check_first_tokens(tokens, self._permit.work, self._context.model)
                return tokens
            await self._receive_chunk(decode_chunk(_expect(request, "chunk").chunk))
        raise TransferError("the push ended without its end message")

    async def _read(self) -> Any:
        """The next message, unless the reservation ends first."""
        reading = asyncio.ensure_future(self._stream.read())
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({reading, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            if not reading.done():
                reading.cancel()
        if self._closed.is_set():
            raise CancelledRequestError("the reservation has ended")
        return await reading

    async def _answer(self, response: kv_transfer_pb2.PushResponse) -> None:
        # Bounded rather than broken off when the reservation ends: gRPC sends no status behind a write that was cancelled.
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._stream.write(response)
        except TimeoutError:
            raise DeadlineError(f"the prefill worker took no answer within {ANSWER_TIMEOUT_S:g} s") from None

    async def _receive_chunk(self, chunk: Chunk) -> None:
        span = chunk.span
        problem = self._assembly.problem_with(span, memoryview(chunk.payload).nbytes)
        if problem is None:
            self._writing = self._context.threads.submit(self._check_and_write, chunk)
            problem = await asyncio.wrap_future(self._writing)
            self._writing = None
        if problem is None:
            self._assembly.add(span)
            await self._answer(_accepted(span))
            return
        _log.warning("refused a KV chunk", request_id=self._permit.work.work_id.request_id, problem=problem)
        self._assembly.refuse(span, problem)
        await self._answer(_refused(span, problem))

    def _check_and_write(self, chunk: Chunk) -> str | None:
        """Runs in a thread. Why the chunk was not written, or None."""
        span, permit = chunk.span, self._permit
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
        self._context.permits.end(permit)
        num_tokens = permit.token_end - permit.token_begin
        self._context.submit(PushEnded(permit.work.work_id, first_tokens, assembly.kv_bytes, num_tokens, problem))


def _expect(request: Any, name: str) -> kv_transfer_pb2.PushRequest:
    if request is grpc.aio.EOF or request.WhichOneof("message") != name:
        raise TransferError(f"the push has no {name} where one must come")
    assert isinstance(request, kv_transfer_pb2.PushRequest)
    return request


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
