"""Where the KV cache leaves the prefill worker: one push per job, while the step still computes.

    engine thread:  layer 0 written, layer 1 written, ...          token 0 sampled
    event loop:        '--> spans --> export, digest, encode (threads) --> send --> end --> complete
                               two chunks ahead                     within a window

Runs on the event loop.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import structlog

from kvrelay.core.chunk_times import ChunkLog, ChunkTime
from kvrelay.core.job import JobId, SequenceToken
from kvrelay.core.model_spec import KVLayout
from kvrelay.core.trace_context import log_fields
from kvrelay.errors import KvrelayError, TransferError
from kvrelay.kv_transfer.codec import Chunk, chunk_digest
from kvrelay.kv_transfer.layout import KVSpan, SpanCoalescer, take_chunk
from kvrelay.kv_transfer.protocols import KVExporter
from kvrelay.kv_transfer.transports import ChunkAccepted, ChunkRefused, KVPush, KVTransport, PushComplete, PushPlan
from kvrelay.runtime.fault_points import fault_point

MAX_COALESCED_BYTES = 1024 * 1024
"""Layers coalesce to this size. Larger only while the network is slower."""
LAST_REPLIES_TIMEOUT_S = 1.0
STALL_TIMEOUT_S = 3.0
"""A decode worker that owes an answer for longer is unreachable. Exceeds a session's window."""
ENCODE_AHEAD = 2
"""Chunks exported ahead, so that threads and wire do not wait for each other."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TransferResult:
    kv_bytes: int
    transfer_ms: float
    exposed_ms: float
    """The part after the first token was sampled."""
    wire_ms: float
    """The part with a chunk under way."""
    num_resent_chunks: int
    transport: str = ""
    chunks: tuple[ChunkTime, ...] = ()
    """Timed from the first byte sent."""


@dataclass(frozen=True, slots=True)
class SenderContext:
    exporter: KVExporter
    layout: KVLayout
    transport: KVTransport
    threads: Executor
    """Export and encode KV."""
    max_message_bytes: int
    max_window_bytes: int
    now: Callable[[], float] = time.monotonic


class KVSender:
    """Pushes one job's KV. Lives on the event loop.

    Args:
        block_ids: where the prompt's KV lies.
        on_ended: called once, in any thread, after the last export.
    """

    def __init__(
        self,
        context: SenderContext,
        address: str,
        plan: PushPlan,
        block_ids: tuple[int, ...],
        on_ended: Callable[[JobId, TransferResult | TransferError], None],
    ) -> None:
        self._context = context
        self._address = address
        self._plan = plan
        self._block_ids = block_ids
        self._on_ended = on_ended
        coalesced_bytes = min(context.max_message_bytes, MAX_COALESCED_BYTES)
        self._coalescer = SpanCoalescer(context.layout, coalesced_bytes, plan.token_begin)
        self._spans: deque[KVSpan] = deque()
        self._unacknowledged: dict[tuple[int, int], KVSpan] = {}
        self._started_at: dict[tuple[int, int], float] = {}
        self._times = ChunkLog()
        self._resent: set[tuple[int, int]] = set()
        self._window_bytes = 0
        self._num_chunks = 0
        self._kv_bytes = 0
        self._tokens: tuple[SequenceToken, ...] | None = None
        self._completed_bytes: int | None = None
        self._first_sent_at: float | None = None
        self._busy_since: float | None = None
        self._wire_s = 0.0
        self._sampled_at = 0.0
        self._changed = asyncio.Event()
        self._stall: asyncio.Timeout | None = None
        self._has_sent_end = False
        self._encoding: deque[asyncio.Future[Any]] = deque()
        """Chunks in the order of sending."""
        self._exports: list[Future[Any]] = []
        """Running exports, also of chunks that were dropped."""
        self._outcome: TransferResult | TransferError = TransferError("the push was broken off")
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"push of {plan.job_id.request_id}")
        # A callback, because a task that is cancelled before it starts runs no `finally`.
        self._task.add_done_callback(lambda _: self._report_after_exports())

    def announce_cached(self, num_tokens: int) -> None:
        """All layers of the first `num_tokens` tokens are in the pool."""
        self._spans.extend(self._coalescer.add_all_layers(0, num_tokens))
        self._changed.set()

    def announce(self, layer: int, token_begin: int, token_end: int) -> None:
        """A layer of tokens [token_begin, token_end) is now in the pool."""
        self._spans.extend(self._coalescer.add_layer(layer, token_begin, token_end))
        self._changed.set()

    def finish(self, tokens: Sequence[SequenceToken]) -> None:
        """All KV is announced."""
        self._tokens = tuple(tokens)
        self._sampled_at = self._context.now()
        self._changed.set()

    @property
    def _log_fields(self) -> dict[str, str | int]:
        return log_fields(self._plan.job_id.request_id, self._plan.job_id.attempt, self._plan.trace)

    def cancel(self) -> None:
        """`on_ended` gets an error."""
        self._task.cancel()

    async def _run(self) -> None:
        push: KVPush | None = None
        try:
            push = await self._context.transport.open(self._address, self._plan)
            fault_point("prefill.push_opened", self._plan)
            self._outcome = await self._push(push)
        except KvrelayError as error:
            self._outcome = TransferError(error.message)
        except Exception:
            _log.exception("a push failed", **self._log_fields)
            self._outcome = TransferError("the push failed; the prefill worker's log has the detail")
        finally:
            if push is not None:
                push.close(is_complete=isinstance(self._outcome, TransferResult))

    def _report_after_exports(self) -> None:
        for export in self._exports:
            if not export.done():
                export.add_done_callback(lambda _: self._report_after_exports())
                return
        self._on_ended(self._plan.job_id, self._outcome)

    async def _push(self, push: KVPush) -> TransferResult:
        reader = asyncio.create_task(self._read_replies(push), name="push replies")
        reader.add_done_callback(lambda _: self._changed.set())
        try:
            async with asyncio.timeout(None) as self._stall:
                try:
                    await self._send_until_complete(push, reader)
                except TransferError:
                    # A failed write ends the call; its replies can still be read.
                    await asyncio.wait([reader], timeout=LAST_REPLIES_TIMEOUT_S)
                    raise
            reader.result()
        except TimeoutError:
            raise TransferError(f"the decode worker acknowledged nothing for {STALL_TIMEOUT_S:g} s") from None
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        return self._measure(push)

    async def _send_until_complete(self, push: KVPush, reader: asyncio.Task[None]) -> None:
        while not reader.done():
            while self._can_encode(push):
                self._start_encoding(push)
            if self._encoding:
                encoded = await self._encoding[0]
                self._encoding.popleft()
                await push.send_chunk(encoded)
                fault_point("prefill.chunk_sent", self._plan)
            elif self._tokens is not None and not self._spans and not self._has_sent_end:
                # Without waiting for the last answers, which may follow the end.
                await push.send_end(self._num_chunks, self._tokens)
                self._has_sent_end = True
                self._restart_stall_timeout()
                fault_point("prefill.end_sent", self._plan)
            else:
                self._changed.clear()
                await self._changed.wait()

    def _restart_stall_timeout(self) -> None:
        assert self._stall is not None, "within _push"
        if self._unacknowledged or self._has_sent_end:
            self._stall.reschedule(asyncio.get_running_loop().time() + STALL_TIMEOUT_S)
        else:
            self._stall.reschedule(None)

    def _can_encode(self, push: KVPush) -> bool:
        """A chunk larger than the window goes alone."""
        if not self._spans or len(self._encoding) >= ENCODE_AHEAD or not push.has_room():
            return False
        num_bytes = min(self._spans[0].num_bytes(self._context.layout), push.max_payload_bytes)
        return self._window_bytes == 0 or self._window_bytes + num_bytes <= self._context.max_window_bytes

    def _start_encoding(self, push: KVPush) -> None:
        now = self._context.now()
        self._first_sent_at = now if self._first_sent_at is None else self._first_sent_at
        self._busy_since = now if self._busy_since is None else self._busy_since
        window_bytes = self._context.max_window_bytes - self._window_bytes
        if (self._spans[0].layer_begin, self._spans[0].token_begin) in self._resent:
            span = self._spans.popleft()  # exactly the refused span
        else:
            span = take_chunk(self._spans, self._context.layout, min(push.max_payload_bytes, window_bytes))
        num_bytes = span.num_bytes(self._context.layout)
        name = (span.layer_begin, span.token_begin)
        self._unacknowledged[name] = span
        self._started_at[name] = now
        self._window_bytes += num_bytes
        if len(self._unacknowledged) == 1:
            self._restart_stall_timeout()
        if name not in self._resent:
            self._num_chunks += 1
        export = self._context.threads.submit(self._encode, push, span, push.acquire_buffer(span, num_bytes))
        self._exports = [each for each in self._exports if not each.done()] + [export]
        self._encoding.append(asyncio.wrap_future(export))

    def _encode(self, push: KVPush, span: KVSpan, buffer: memoryview) -> Any:
        """Runs in an export thread."""
        self._context.exporter.export_kv(buffer, span, self._block_ids)
        digest = chunk_digest(self._plan.ticket, self._plan.job_id.attempt, span, buffer)
        return push.encode(Chunk(span, buffer, digest))

    async def _read_replies(self, push: KVPush) -> None:
        async with contextlib.aclosing(push.replies()) as replies:
            async for reply in replies:
                match reply:
                    case ChunkAccepted(layer_begin, token_begin):
                        self._ack_until(push, (layer_begin, token_begin))
                    case ChunkRefused(layer_begin, token_begin, message):
                        self._send_again(push, (layer_begin, token_begin), message)
                    case PushComplete(kv_bytes):
                        self._completed_bytes = kv_bytes
                        return
                self._restart_stall_timeout()
                self._changed.set()
        raise TransferError("the decode worker ended the push without completing it")

    def _ack_until(self, push: KVPush, name: tuple[int, int]) -> None:
        """Also accepts all chunks before, because the receiver takes them in order."""
        for each in list(self._unacknowledged):
            self._ack(push, each)
            if each == name:
                return
        raise TransferError("the decode worker acknowledged a chunk that was not sent")

    def _ack(self, push: KVPush, name: tuple[int, int]) -> KVSpan:
        span = self._unacknowledged.pop(name, None)
        if span is None:
            raise TransferError("the decode worker refused a chunk that was not sent")
        push.ack(span)
        num_bytes = span.num_bytes(self._context.layout)
        self._window_bytes -= num_bytes
        self._kv_bytes += num_bytes
        now = self._context.now()
        self._record_time(span, self._started_at.pop(name), now)
        if not self._unacknowledged and self._busy_since is not None:
            self._wire_s += now - self._busy_since
            self._busy_since = None
        return span

    def _record_time(self, span: KVSpan, started_at: float, now: float) -> None:
        assert self._first_sent_at is not None, "something was under way"
        begin_ms, end_ms = (started_at - self._first_sent_at) * 1000, (now - self._first_sent_at) * 1000
        tokens, layers = (span.token_begin, span.token_end), (span.layer_begin, span.layer_end)
        self._times.add(ChunkTime(begin_ms, end_ms, *tokens, *layers, span.num_bytes(self._context.layout)))

    def _send_again(self, push: KVPush, name: tuple[int, int], message: str) -> None:
        span = self._ack(push, name)
        self._kv_bytes -= span.num_bytes(self._context.layout)
        if name in self._resent:
            raise TransferError(f"the decode worker refused a chunk twice: {message}")
        _log.warning("a chunk was refused and is sent once more", message=message, **self._log_fields)
        self._resent.add(name)
        self._spans.appendleft(span)

    def _measure(self, push: KVPush) -> TransferResult:
        if self._completed_bytes is None or self._completed_bytes != self._kv_bytes:
            raise TransferError(f"{self._kv_bytes} KV bytes were sent, {self._completed_bytes} received")
        assert self._first_sent_at is not None, "a push has at least one chunk"
        now = self._context.now()
        exposed_ms = max(0.0, now - max(self._sampled_at, self._first_sent_at)) * 1000
        transfer_ms = (now - self._first_sent_at) * 1000
        return TransferResult(
            self._kv_bytes,
            transfer_ms,
            exposed_ms,
            self._wire_s * 1000,
            len(self._resent),
            push.transport_name,
            self._times.times,
        )
