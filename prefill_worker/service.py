"""The prefill worker towards gateways: commands of sessions go to the engine thread, its reports come back as events and pushes.

Runs on the event loop, and owns the senders.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from kvrelay.errors import TransferError
from kvrelay.fault_points import fault_point
from kvrelay.grammar import CompiledGrammar
from kvrelay.kv_transfer.codec import TICKET_BYTES
from kvrelay.kv_transfer.transports import PushPlan
from kvrelay.model_spec import ModelSpec
from kvrelay.response_format import ResponseFormat
from kvrelay.trace_context import TraceContext
from kvrelay.v1 import prefill_pb2, prefill_pb2_grpc, session_pb2
from kvrelay.wire import chunk_time_to_pb, sequence_token_to_pb, work_id_from_pb, work_id_to_pb
from kvrelay.work import FailureKind, Work, WorkId
from kvrelay.work_traces import WorkTraces
from kvrelay.worker_grammars import WorkPreparation, refuse_form
from kvrelay.worker_session import WorkerSession
from kvrelay.worker_sessions import WorkerSessions
from prefill_worker import commands, events
from prefill_worker.kv_sender import KVSender, SenderContext, TransferResult
from prefill_worker.metrics import PrefillMetrics

_log = structlog.get_logger(__name__)

ENDS = (events.WorkEnded, events.WorkFailed)
NOTHING_SENT = TransferResult(kv_bytes=0, transfer_ms=0.0, exposed_ms=0.0, wire_ms=0.0, num_resent_chunks=0)


@dataclass(frozen=True, slots=True)
class PushTarget:
    """Where a work's KV goes."""

    ticket: bytes
    address: str
    num_cached_tokens: int
    """Leading tokens that the receiver has."""


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves sessions.

    Args:
        hello: who the worker is.
        model: the served model.
        sender_context: shared by all pushes.
        submit: to the engine thread; called in any thread.
        submit_work: the same for new works; False when its inbox is full.
        traces: spans of works; by default none.
        compile_form: called in threads, gives the grammar that a form is; by default refuses all.
    """

    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        model: ModelSpec,
        sender_context: SenderContext,
        submit: Callable[[commands.Command], None],
        submit_work: Callable[[commands.Command], bool],
        traces: WorkTraces | None = None,
        compile_form: Callable[[ResponseFormat], CompiledGrammar] = refuse_form,
    ) -> None:
        self._model = model
        self._sender_context = sender_context
        self._submit = submit
        self._submit_work = submit_work
        self._targets: dict[WorkId, PushTarget] = {}
        self._senders: dict[WorkId, KVSender] = {}
        self.metrics = PrefillMetrics()
        self._traces = traces or WorkTraces()
        self.sessions = WorkerSessions(hello, prefill_pb2.PrefillServiceSessionResponse, model, self._give_up, self._fail)
        self._preparation = WorkPreparation(compile_form, self._report_failure)

    async def Session(  # type: ignore[override]  # a coroutine that writes to the context
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self.sessions.serve(context, self.take_command)

    def report(self, report: events.Report) -> None:
        """What the engine thread has to say; called on the event loop, in order."""
        self.sessions.update_load(report.load)
        for event in report.events:
            self._handle_event(event)
        if not report.events or any(isinstance(event, ENDS) for event in report.events):
            # What was freed is news to the router, and perhaps nothing else tells of it.
            self.sessions.broadcast_load()

    def announce(self, layer: int, written: tuple[events.WrittenTokens, ...]) -> None:
        """A layer of these tokens is in the pool; called on the event loop, in order with the reports."""
        for tokens in written:
            if sender := self._senders.get(tokens.work_id):
                sender.announce(layer, tokens.token_begin, tokens.token_end)

    @property
    def num_senders(self) -> int:
        """Pushes under way."""
        return len(self._senders)

    def take_command(self, session: WorkerSession, name: str, message: Any) -> None:
        """A message of a session, by the name of its field."""
        match name:
            case "start_prefill":
                self._start_prefill(session, message)
            case "cancel_work":
                self.sessions.cancel(session, work_id_from_pb(message.work_id))

    def _start_prefill(self, session: WorkerSession, message: prefill_pb2.StartPrefill) -> None:
        if len(message.ticket) != TICKET_BYTES or not 0 <= message.num_cached_tokens < len(message.token_ids):
            problem = f"a ticket of {TICKET_BYTES} bytes is needed, and fewer cached tokens than there are"
            self.sessions.refuse(session, work_id_from_pb(message.work_id), FailureKind.INVALID, problem)
            return
        work = self.sessions.admit(session, message)
        if work is None:
            return
        self._traces.begin(work)
        _log.debug("a prompt came", num_tokens=len(work.token_ids), **work.log_fields)
        fault_point("prefill.work_received", work)
        self._targets[work.work_id] = PushTarget(message.ticket, message.push_address, message.num_cached_tokens)
        received_at = time.monotonic()
        self._preparation.prepare(work, lambda prepared: self._submit_prompt(prepared, received_at))

    def _submit_prompt(self, work: Work, received_at: float) -> None:
        if not self._submit_work(commands.StartPrompt(work, received_at)):
            self._report_failure(work.work_id, FailureKind.OUT_OF_CAPACITY, "the worker's inbox is full")

    def _give_up(self, work_id: WorkId) -> None:
        self._stop_sender(work_id)
        if self._preparation.drop(work_id):
            self._handle_event(events.WorkEnded(work_id))
        else:
            self._submit(commands.GiveUp(work_id))

    def _fail(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        self._stop_sender(work_id)
        if self._preparation.drop(work_id):
            self._report_failure(work_id, kind, message)
        else:
            self._submit(commands.Fail(work_id, kind, message))

    def _report_failure(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        self._handle_event(events.WorkFailed(work_id, kind, message))

    def _stop_sender(self, work_id: WorkId) -> None:
        """Without waiting for the engine thread, which may be in a long step."""
        if sender := self._senders.get(work_id):
            sender.stop()

    def _handle_event(self, event: events.Event) -> None:
        match event:
            case events.PromptStarted():
                if event.sends_kv:
                    self._start_sender(event)
            case events.PromptComputed(work_id):
                self._report_computed(event)
            case events.SendingStopped(work_id):
                self._stop_sender(work_id)
            case events.WorkFailed(work_id, kind, message):
                self._targets.pop(work_id, None)
                self.sessions.report_failure(work_id, kind, message)
                self._traces.record(work_id, "failed", 0.0, error=kind.value)
                self._traces.end(work_id)
            case events.WorkEnded(work_id):
                self._targets.pop(work_id, None)
                self.sessions.leases.end(work_id)
                self._traces.end(work_id)

    def _start_sender(self, event: events.PromptStarted) -> None:
        work, target = event.work, self._targets[event.work.work_id]
        trace = self._traces.new_child(work.work_id) or work.trace
        plan = PushPlan(
            work.work_id, target.ticket, self._model.fingerprint, target.num_cached_tokens, len(work.token_ids), trace
        )
        loop = asyncio.get_running_loop()
        sender = KVSender(
            self._sender_context,
            target.address,
            plan,
            event.block_ids,
            on_ended=lambda work_id, outcome: _call_soon(loop, self._on_sender_ended, work_id, outcome, trace),
        )
        self._traces.mark(work.work_id, "kv.send")
        self._senders[work.work_id] = sender
        sender.announce_cached(event.num_cached_tokens)

    def _report_computed(self, event: events.PromptComputed) -> None:
        self.metrics.note_computed(event)
        self._trace_prompt(event)
        done = prefill_pb2.PrefillDone(
            work_id=work_id_to_pb(event.work_id),
            tokens=[sequence_token_to_pb(token) for token in event.tokens],
            queue_ms=event.queue_ms,
            prefill_ms=event.prefill_ms,
            num_cached_tokens=event.num_cached_tokens,
            chunks=map(chunk_time_to_pb, event.chunks),
        )
        self.sessions.send(event.work_id, prefill_done=done)
        fault_point("prefill.first_token_reported", event)
        if not event.sends_kv:
            self._report_transferred(event.work_id, NOTHING_SENT)
        elif sender := self._senders.get(event.work_id):
            sender.finish(event.tokens)

    def _on_sender_ended(self, work_id: WorkId, outcome: TransferResult | TransferError, trace: TraceContext | None) -> None:
        del self._senders[work_id]
        self._trace_push(work_id, outcome, trace)
        if isinstance(outcome, TransferResult):
            fault_point("prefill.transfer_acknowledged", work_id)
            self.sessions.add_kv_bytes(outcome.kv_bytes)
            self.metrics.note_transferred(outcome)
            self._report_transferred(work_id, outcome)
            self._submit(commands.SenderEnded(work_id, None))
        else:
            self.metrics.num_failed_transfers += 1
            self._submit(commands.SenderEnded(work_id, outcome.message))

    def _trace_push(self, work_id: WorkId, outcome: TransferResult | TransferError, trace: TraceContext | None) -> None:
        if isinstance(outcome, TransferError):
            self._traces.record_since_mark(work_id, "kv.send", own=trace, kind="producer", error=outcome.message)
            return
        self._traces.record(
            work_id,
            "kv.send",
            outcome.transfer_ms / 1000,
            own=trace,
            kind="producer",
            attributes={
                "kvrelay.kv_bytes": outcome.kv_bytes,
                "kvrelay.exposed_ms": outcome.exposed_ms,
                "kvrelay.transport": outcome.transport,
            },
        )

    def _trace_prompt(self, event: events.PromptComputed) -> None:
        prefill_s = event.prefill_ms / 1000
        self._traces.record(event.work_id, "prefill.queue", event.queue_ms / 1000, prefill_s)
        num_cached = {"kvrelay.num_cached_tokens": event.num_cached_tokens}
        self._traces.record(event.work_id, "prefill", prefill_s, attributes=num_cached)

    def _report_transferred(self, work_id: WorkId, result: TransferResult) -> None:
        done = prefill_pb2.TransferDone(
            work_id=work_id_to_pb(work_id),
            kv_bytes=result.kv_bytes,
            transfer_ms=result.transfer_ms,
            exposed_ms=result.exposed_ms,
            wire_ms=result.wire_ms,
            num_resent_chunks=result.num_resent_chunks,
            transport=result.transport,
            chunks=map(chunk_time_to_pb, result.chunks),
        )
        self.sessions.send(work_id, transfer_done=done)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    """From any thread. A loop that has ended needs to know nothing any more."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, *arguments)
