"""Checks pushes of KV cache and writes them into reservations.

    header   ticket, attempt, fingerprint, wire, range      before anything is written
    chunk    range within the reservation, size, digest     before it is written; else refused
    end      digest, completeness, all first tokens         before the sequences may run

Runs on the event loop; threads check digests and write.
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
from decode_worker.receiving.kv_reassembly import KVReassembly
from decode_worker.receiving.push_inbox import PushInbox
from decode_worker.receiving.write_grants import WriteGrant, WriteGrants
from kvrelay.core.bounds import check_length
from kvrelay.core.job import Job, SequenceToken
from kvrelay.core.model_spec import WIRE_VERSION, ModelSpec
from kvrelay.core.trace_context import current_trace
from kvrelay.errors import DeadlineError, FingerprintError, KvrelayError, TransferError
from kvrelay.kv_transfer.codec import Chunk, SharedChunk, chunk_digest, decode_request, end_digest
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.kv_transfer.protocols import KVImporter
from kvrelay.kv_transfer.shared_memory import SharedRegion
from kvrelay.kv_transfer.shm_fd_passing import RegionServer
from kvrelay.runtime.fault_points import fault_point
from kvrelay.v1 import kv_transfer_pb2
from kvrelay.wire.convert import job_id_from_pb, sequence_token_from_pb
from kvrelay.worker.job_traces import JobTraces

HEADER_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 2.0
"""Time to send one answer."""

MAX_WRITE_BYTES = 2 * 1024 * 1024
"""Bytes per executor call; may exceed by one chunk."""
SERVICE_NAME = "kvrelay.v1.KVTransferService"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReceiverContext:
    importer: KVImporter
    model: ModelSpec
    grants: WriteGrants
    threads: Executor
    submit: Callable[[PushEnded], None]
    """Called in any thread."""
    shared_memory: RegionServer | None = None
    traces: JobTraces = field(default_factory=JobTraces)


class KVReceiver:
    def __init__(self, context: ReceiverContext) -> None:
        self._context = context

    def add_to(self, server: grpc.aio.Server) -> None:
        """Takes raw messages of Push, because decoding would copy every payload."""
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
        memory = self._context.shared_memory
        if memory is None or not memory.is_listening:
            return kv_transfer_pb2.OfferSharedMemoryResponse()
        endpoint = memory.endpoint
        return kv_transfer_pb2.OfferSharedMemoryResponse(
            socket_name=endpoint.socket_name,
            key=endpoint.key,
            max_region_bytes=endpoint.max_region_bytes,
            max_regions=endpoint.max_regions,
        )

    async def Push(self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Reads and writes through the context, both at once."""
        try:
            async with asyncio.timeout(HEADER_TIMEOUT_S):
                header = _expect_header(await context.read())
        except TimeoutError:
            raise DeadlineError(f"no header came within {HEADER_TIMEOUT_S:g} s") from None
        self._check_header(header)
        inbox = PushInbox(context)
        loop = asyncio.get_running_loop()

        def on_revoked() -> None:
            loop.call_soon_threadsafe(inbox.close)

        grant = self._context.grants.start_write(job_id_from_pb(header.job_id), header.ticket, on_revoked)
        fault_point("decode.push_begun", grant.job)
        reading = loop.create_task(inbox.read(), name="push messages")
        try:
            await _IncomingPush(self._context, grant, inbox, context).receive(header)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _check_header(self, header: kv_transfer_pb2.PushHeader) -> None:
        if header.wire_version != WIRE_VERSION:
            raise FingerprintError(f"the push has wire version {header.wire_version}; this worker reads {WIRE_VERSION}")
        if header.fingerprint != self._context.model.fingerprint:
            raise FingerprintError("the push comes from another model, or from the same one served differently")
        check_length("header.job_id.request_id", header.job_id.request_id)


class _IncomingPush:
    def __init__(self, context: ReceiverContext, grant: WriteGrant, inbox: PushInbox, stream: Any) -> None:
        self._context = context
        self._grant = grant
        self._inbox = inbox
        self._stream = stream
        self._assembly = KVReassembly(context.model.kv_layout, grant.token_begin, grant.token_end)
        self._region: SharedRegion | None = None
        self._first_tokens: tuple[SequenceToken, ...] | None = None
        self._num_sent_chunks = 0
        self._answers: deque[kv_transfer_pb2.PushResponse] = deque()
        self._writing: Future[list[str | None]] | None = None

    async def receive(self, header: kv_transfer_pb2.PushHeader) -> None:
        """Always reports the end to the engine, after the last write."""
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
            fault_point("decode.push_complete", self._grant.job)
        except KvrelayError as error:
            failure = error
        finally:
            problem = "the prefill worker broke the push off" if failure is None else failure.message
            self._trace(began_at, "" if is_complete else problem)
            self._end(self._first_tokens if is_complete else None, problem)
        # The engine continues while the sender gets its answer.
        await self._send_answers()
        if failure is not None:
            raise failure
        complete = kv_transfer_pb2.PushComplete(kv_bytes=self._assembly.kv_bytes)
        await self._answer(kv_transfer_pb2.PushResponse(complete=complete))

    def _trace(self, began_at: float, problem: str) -> None:
        self._context.traces.record(
            self._grant.job.job_id,
            "kv.receive",
            time.monotonic() - began_at,
            parent=current_trace(),
            kind="consumer",
            error=problem,
            attributes={"kvrelay.kv_bytes": self._assembly.kv_bytes},
        )

    def _check_range(self, header: kv_transfer_pb2.PushHeader) -> None:
        expected = (self._grant.token_begin, self._grant.token_end)
        if (header.token_begin, header.token_end) != expected:
            pushed = f"[{header.token_begin}, {header.token_end})"
            raise TransferError(f"the push is of tokens {pushed}, not [{expected[0]}, {expected[1]})")

    def _borrow(self, region_id: bytes) -> SharedRegion:
        if self._context.shared_memory is None:
            raise TransferError("this worker takes no shared memory")
        return self._context.shared_memory.lend(region_id)

    def _is_complete(self) -> bool:
        """Raises TransferError when a missing part will not come."""
        if self._first_tokens is None or self._assembly.awaits_chunks:
            return False
        self._assembly.check_end(self._num_sent_chunks)
        return True

    async def _take_messages(self, messages: Sequence[bytes]) -> None:
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
        grant, num_chunks = self._grant, request.end.num_chunks
        if len(request.end.tokens) > grant.job.num_sequences:
            raise TransferError("the push's end has more tokens than the job has sequences")
        tokens = tuple(sequence_token_from_pb(token) for token in request.end.tokens)
        expected = end_digest(grant.ticket, grant.job.job_id.attempt, num_chunks, tokens)
        if not hmac.compare_digest(expected, request.end.digest):
            raise TransferError("the digest of the push's end does not match")
        _check_first_tokens(tokens, grant.job, self._context.model)
        self._first_tokens = tokens
        self._num_sent_chunks = num_chunks

    def _with_payload(self, chunk: Chunk | SharedChunk) -> Chunk:
        """The payload is empty if it would lie outside the region."""
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
        # Bounded in time, not cancelled: gRPC sends no status after a cancelled write.
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._stream.write(response)
        except TimeoutError:
            raise DeadlineError(f"the prefill worker took no answer within {ANSWER_TIMEOUT_S:g} s") from None

    async def _write(self, chunks: Sequence[Chunk]) -> None:
        """Answers earlier chunks meanwhile. `chunks` are disjoint."""
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
            self._on_written(chunk.span, problem)

    def _on_written(self, span: KVSpan, problem: str | None) -> None:
        """Merges acceptances in a row into one answer."""
        if problem is not None:
            _log.warning("refused a KV chunk", problem=problem, **self._grant.job.log_fields)
            self._answers.append(_refused(span, problem))
            self._assembly.refuse(span, problem)
            return
        self._assembly.add(span)
        fault_point("decode.chunk_written", self._grant.job)
        if self._answers and self._answers[-1].WhichOneof("message") == "chunk_accepted":
            self._answers.pop()
        self._answers.append(_accepted(span))

    def _check_and_write(self, chunks: Sequence[Chunk]) -> list[str | None]:
        """Runs in a thread. Why each chunk was not written, or None."""
        return [self._check_and_write_one(chunk) for chunk in chunks]

    def _check_and_write_one(self, chunk: Chunk) -> str | None:
        span, grant = chunk.span, self._grant
        fault_point("decode.chunk_write_begins", grant.job)
        expected = chunk_digest(grant.ticket, grant.job.job_id.attempt, span, chunk.payload)
        if not hmac.compare_digest(expected, chunk.digest):
            return "the digest does not match"
        assert not isinstance(chunk.payload, bytearray)
        self._context.importer.import_kv(chunk.payload, span, grant.block_ids)
        return None

    def _end(self, first_tokens: tuple[SequenceToken, ...] | None, problem: str) -> None:
        if self._writing is None:
            self._report(first_tokens, problem)
        else:
            # The writing thread reports, so that blocks are not freed under its write.
            self._writing.add_done_callback(lambda _: self._report(None, problem))

    def _report(self, first_tokens: tuple[SequenceToken, ...] | None, problem: str) -> None:
        grant, assembly = self._grant, self._assembly
        if self._region is not None and self._context.shared_memory is not None:
            self._context.shared_memory.release(self._region)
        self._context.grants.finish_write(grant)
        num_tokens = grant.token_end - grant.token_begin
        self._context.submit(PushEnded(grant.job.job_id, first_tokens, assembly.kv_bytes, num_tokens, problem))


def _expect_header(message: Any) -> kv_transfer_pb2.PushHeader:
    request = None if message is grpc.aio.EOF else decode_request(message)
    if not isinstance(request, kv_transfer_pb2.PushRequest) or request.WhichOneof("message") != "header":
        raise TransferError("the push does not begin with a header")
    return request.header


def _check_first_tokens(tokens: Sequence[SequenceToken], job: Job, model: ModelSpec) -> None:
    """Raises TransferError unless these are the first tokens of all sequences, in order."""
    said = [(token.job_id, token.sequence, token.index) for token in tokens]
    if said != [(job.job_id, number, job.first_index) for number in job.sequences]:
        raise TransferError("the push's first tokens are not those of the job's sequences")
    if any(token.token.token_id >= model.vocab_size for token in tokens):
        raise TransferError("a first token is outside of the vocabulary")


def _accepted(span: KVSpan) -> kv_transfer_pb2.PushResponse:
    accepted = kv_transfer_pb2.ChunkAccepted(layer_begin=span.layer_begin, token_begin=span.token_begin)
    return kv_transfer_pb2.PushResponse(chunk_accepted=accepted)


def _refused(span: KVSpan, problem: str) -> kv_transfer_pb2.PushResponse:
    refused = kv_transfer_pb2.ChunkRefused(layer_begin=span.layer_begin, token_begin=span.token_begin, message=problem)
    return kv_transfer_pb2.PushResponse(chunk_refused=refused)
