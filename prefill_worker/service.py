"""The prefill worker towards gateways, on the event loop. Owns the senders."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from kvrelay.core.job import FailureKind, Job, JobId
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.trace_context import TraceContext
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.codec import TICKET_BYTES
from kvrelay.kv_transfer.transports import PushPlan
from kvrelay.runtime.event_loop import call_soon
from kvrelay.runtime.fault_points import fault_point
from kvrelay.security.cluster_key import ProveWorker, prove_nothing
from kvrelay.v1 import prefill_pb2, prefill_pb2_grpc, session_pb2
from kvrelay.wire.convert import chunk_time_to_pb, job_id_from_pb, job_id_to_pb, sequence_token_to_pb
from kvrelay.worker.commands import JobEnd, JobEnded, JobFailed
from kvrelay.worker.gateway_session import EventSink
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.job_preparation import CompileGrammar, EngineInbox, JobPreparation, refuse_response_format
from kvrelay.worker.job_traces import JobTraces
from kvrelay.worker.ownership import OwnerLookup
from prefill_worker import commands
from prefill_worker.kv_sender import KVSender, SenderContext, TransferResult
from prefill_worker.metrics import PrefillMetrics
from prefill_worker.scheduling import events

_log = structlog.get_logger(__name__)

NOTHING_SENT = TransferResult(kv_bytes=0, transfer_ms=0.0, exposed_ms=0.0, wire_ms=0.0, num_resent_chunks=0)


@dataclass(frozen=True, slots=True)
class PushTarget:
    ticket: bytes
    address: str
    num_cached_tokens: int
    """At the receiver."""


class PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        model: ModelSpec,
        sender_context: SenderContext,
        inbox: EngineInbox[commands.Command],
        traces: JobTraces | None = None,
        compile_grammar: CompileGrammar = refuse_response_format,
        owners: OwnerLookup | None = None,
        prove: ProveWorker = prove_nothing,
    ) -> None:
        self._model = model
        self._sender_context = sender_context
        self._inbox = inbox
        self._targets: dict[JobId, PushTarget] = {}
        self._senders: dict[JobId, KVSender] = {}
        self.metrics = PrefillMetrics()
        self._traces = traces or JobTraces()
        self.sessions = GatewaySessions(
            hello, prefill_pb2.PrefillServiceSessionResponse, model, self._cancel, self._fail, owners, prove
        )
        self._preparation: JobPreparation[commands.Command] = JobPreparation(
            inbox, compile_grammar, self._on_ended, self._on_failed
        )

    async def Session(  # type: ignore[override]  # a coroutine that writes to the context
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self.sessions.serve(context, self.handle_command)

    def report(self, report: events.Report) -> None:
        """Called in the order of reports."""
        self.sessions.update_load(report.load)
        self.sessions.update_cache(report.cache_changes)
        for event in report.events:
            self._handle_event(event)
        if not report.events or any(isinstance(event, JobEnd) for event in report.events):
            # Freed room may have no other message to travel with.
            self.sessions.broadcast_load()

    def announce(self, layer: int, written: tuple[events.WrittenTokens, ...]) -> None:
        """Ordered with the reports."""
        for tokens in written:
            if sender := self._senders.get(tokens.job_id):
                sender.announce(layer, tokens.token_begin, tokens.token_end)

    @property
    def num_senders(self) -> int:
        return len(self._senders)

    def handle_command(self, session: EventSink, name: str, message: Any) -> None:
        match name:
            case "start_prefill":
                self._start_prefill(session, message)
            case "cancel_job":
                self.sessions.cancel(session, job_id_from_pb(message.job_id))

    def _start_prefill(self, session: EventSink, message: prefill_pb2.StartPrefill) -> None:
        if len(message.ticket) != TICKET_BYTES or not 0 <= message.num_cached_tokens < len(message.token_ids):
            problem = f"a ticket of {TICKET_BYTES} bytes is needed, and fewer cached tokens than there are"
            self.sessions.refuse(session, job_id_from_pb(message.job_id), FailureKind.INVALID, problem)
            return
        target = PushTarget(message.ticket, message.push_address, message.num_cached_tokens)
        self.sessions.admit(session, message, lambda job: self._start_prompt(job, target))

    def _start_prompt(self, job: Job, target: PushTarget) -> None:
        self._traces.begin(job)
        _log.debug("a prompt came", num_tokens=len(job.token_ids), **job.log_fields)
        fault_point("prefill.job_received", job)
        self._targets[job.job_id] = target
        received_at = time.monotonic()
        self._preparation.start(job, lambda prepared: commands.StartPrompt(prepared, received_at))

    def _cancel(self, job_id: JobId) -> None:
        self._stop_sender(job_id)
        self._preparation.cancel(job_id)

    def _fail(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        self._stop_sender(job_id)
        self._preparation.fail(job_id, kind, message)

    def _stop_sender(self, job_id: JobId) -> None:
        """Does not wait for the engine thread, which may be in a long step."""
        if sender := self._senders.get(job_id):
            sender.cancel()

    def _handle_event(self, event: events.Event) -> None:
        match event:
            case events.PromptStarted():
                if event.sends_kv:
                    self._start_sender(event)
            case events.PromptComputed(job_id):
                self._report_computed(event)
            case events.SendingStopped(job_id):
                self._stop_sender(job_id)
            case JobFailed(job_id, kind, message):
                self._on_failed(job_id, kind, message)
            case JobEnded(job_id):
                self._on_ended(job_id)

    def _on_failed(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        self.sessions.report_failure(job_id, kind, message)
        self._traces.record(job_id, "failed", 0.0, error=kind.value)
        self._on_ended(job_id)

    def _on_ended(self, job_id: JobId) -> None:
        self._targets.pop(job_id, None)
        self.sessions.leases.end(job_id)
        self._traces.end(job_id)

    def _start_sender(self, event: events.PromptStarted) -> None:
        job, target = event.job, self._targets[event.job.job_id]
        trace = self._traces.new_child(job.job_id) or job.trace
        plan = PushPlan(
            job.job_id, target.ticket, self._model.fingerprint, target.num_cached_tokens, len(job.token_ids), trace
        )
        loop = asyncio.get_running_loop()
        sender = KVSender(
            self._sender_context,
            target.address,
            plan,
            event.block_ids,
            on_ended=lambda job_id, outcome: call_soon(loop, self._on_sender_ended, job_id, outcome, trace),
        )
        self._traces.mark(job.job_id, "kv.send")
        self._senders[job.job_id] = sender
        sender.announce_cached(event.num_cached_tokens)

    def _report_computed(self, event: events.PromptComputed) -> None:
        self.metrics.record_prompt(event)
        self._trace_prompt(event)
        done = prefill_pb2.PrefillDone(
            job_id=job_id_to_pb(event.job_id),
            tokens=[sequence_token_to_pb(token) for token in event.tokens],
            queue_ms=event.queue_ms,
            prefill_ms=event.prefill_ms,
            num_cached_tokens=event.num_cached_tokens,
            chunks=map(chunk_time_to_pb, event.chunks),
        )
        self.sessions.send(event.job_id, prefill_done=done)
        fault_point("prefill.first_token_reported", event)
        if not event.sends_kv:
            self._report_transferred(event.job_id, NOTHING_SENT)
        elif sender := self._senders.get(event.job_id):
            sender.finish(event.tokens)

    def _on_sender_ended(
        self, job_id: JobId, outcome: TransferResult | TransferError, trace: TraceContext | None
    ) -> None:
        del self._senders[job_id]
        self._trace_push(job_id, outcome, trace)
        if isinstance(outcome, TransferResult):
            fault_point("prefill.transfer_acknowledged", job_id)
            self.sessions.add_kv_bytes(outcome.kv_bytes)
            self.metrics.record_transfer(outcome)
            self._report_transferred(job_id, outcome)
            self._inbox.submit(commands.SenderEnded(job_id, None))
        else:
            self.metrics.num_failed_transfers += 1
            self._inbox.submit(commands.SenderEnded(job_id, outcome.message))

    def _trace_push(self, job_id: JobId, outcome: TransferResult | TransferError, trace: TraceContext | None) -> None:
        if isinstance(outcome, TransferError):
            self._traces.record_since_mark(job_id, "kv.send", own=trace, kind="producer", error=outcome.message)
            return
        self._traces.record(
            job_id,
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
        self._traces.record(event.job_id, "prefill.queue", event.queue_ms / 1000, prefill_s)
        num_cached = {"kvrelay.num_cached_tokens": event.num_cached_tokens}
        self._traces.record(event.job_id, "prefill", prefill_s, attributes=num_cached)

    def _report_transferred(self, job_id: JobId, result: TransferResult) -> None:
        done = prefill_pb2.TransferDone(
            job_id=job_id_to_pb(job_id),
            kv_bytes=result.kv_bytes,
            transfer_ms=result.transfer_ms,
            exposed_ms=result.exposed_ms,
            wire_ms=result.wire_ms,
            num_resent_chunks=result.num_resent_chunks,
            transport=result.transport,
            chunks=map(chunk_time_to_pb, result.chunks),
        )
        self.sessions.send(job_id, transfer_done=done)
