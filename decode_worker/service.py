"""The decode worker towards gateways, on the event loop.

sessions -> commands -> engine thread -> reports -> sessions
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from typing import Any

import grpc
import structlog

from decode_worker import commands
from decode_worker.metrics import DecodeMetrics
from decode_worker.reservation_watch import ReservationWatch
from decode_worker.scheduling import events
from kvrelay.core.job import FailureKind, Job, JobId, SequenceToken
from kvrelay.core.model_spec import ModelSpec
from kvrelay.runtime.fault_points import fault_point
from kvrelay.security.cluster_key import ProveWorker, prove_nothing
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, session_pb2
from kvrelay.wire.convert import chunk_time_to_pb, job_id_from_pb, job_id_to_pb, sequence_token_to_pb
from kvrelay.worker.commands import JobEnd, JobEnded, JobFailed
from kvrelay.worker.gateway_session import EventSink
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.job_preparation import CompileGrammar, EngineInbox, JobPreparation, refuse_response_format
from kvrelay.worker.job_traces import JobTraces
from kvrelay.worker.ownership import OwnerLookup

_log = structlog.get_logger(__name__)


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        model: ModelSpec,
        push_address: str,
        inbox: EngineInbox[commands.Command],
        traces: JobTraces | None = None,
        compile_grammar: CompileGrammar = refuse_response_format,
        owners: OwnerLookup | None = None,
        prove: ProveWorker = prove_nothing,
    ) -> None:
        self._model = model
        self._push_address = push_address
        self._inbox = inbox
        self.metrics = DecodeMetrics()
        self._traces = traces or JobTraces()
        self._preparation: JobPreparation[commands.Command] = JobPreparation(
            inbox, compile_grammar, self._on_ended, self._on_failed
        )
        cancel, fail = self._preparation.cancel, self._preparation.fail
        self._watch = ReservationWatch(fail, self._offer_idle)
        self.sessions = GatewaySessions(
            hello, decode_pb2.DecodeServiceSessionResponse, model, cancel, fail, owners, prove
        )

    async def Session(  # type: ignore[override]  # a coroutine that writes to the context
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self.sessions.serve(context, self.handle_command)

    def report(self, report: events.StepReport) -> None:
        """Called in the order of reports."""
        self.metrics.record_report(report)
        self.sessions.update_load(report.load)
        self.sessions.update_cache(report.cache_changes)
        for event in report.events:
            self._send_event(event)
        if report.tokens:
            self._send_tokens(report.tokens)
        for event in report.events:
            if isinstance(event, JobEnded):
                self._on_ended(event.job_id)
        if any(isinstance(event, JobEnd) for event in report.events) or not (report.events or report.tokens):
            # Freed room may have no other message to travel with.
            self.sessions.broadcast_load()

    def handle_command(self, session: EventSink, name: str, message: Any) -> None:
        match name:
            case "reserve":
                self._reserve(session, message)
            case "run_prompt":
                self._run_prompt(session, job_id_from_pb(message.job_id))
            case "finish_sequence":
                self._submit_own(session, commands.EndSequence(job_id_from_pb(message.job_id), message.sequence))
            case "set_paused":
                self._submit_own(session, commands.SetPaused(job_id_from_pb(message.job_id), message.paused))
            case "cancel_job":
                self.sessions.cancel(session, job_id_from_pb(message.job_id))

    def _reserve(self, session: EventSink, message: decode_pb2.Reserve) -> None:
        if message.fingerprint != self._model.fingerprint:
            problem = "the worker serves another model than the one that was asked for"
            self.sessions.refuse(session, job_id_from_pb(message.job_id), FailureKind.INVALID, problem)
            return
        self.sessions.admit(session, message, self._start_reservation)

    def _start_reservation(self, job: Job) -> None:
        self._traces.begin(job)
        self._traces.mark(job.job_id, "reserve")
        _log.debug("blocks are asked for", num_tokens=len(job.token_ids), **job.log_fields)
        fault_point("decode.job_received", job)
        if problem := self._watch.refusal_of(job):
            self._on_failed(job.job_id, FailureKind.OUT_OF_CAPACITY, problem)
            return
        self._preparation.start(job, commands.ReserveBlocks)

    def _run_prompt(self, session: EventSink, job_id: JobId) -> None:
        if self.sessions.leases.session_of(job_id) is session:
            self._watch.on_used(job_id)
        self._submit_own(session, commands.ComputePrompt(job_id))

    def _offer_idle(self, idle: tuple[JobId, ...]) -> None:
        self._inbox.submit(commands.YieldReservations(idle))

    def _submit_own(
        self, session: EventSink, command: commands.ComputePrompt | commands.EndSequence | commands.SetPaused
    ) -> None:
        """Ignores gateways that the job does not belong to."""
        if self.sessions.leases.session_of(command.job_id) is session:
            self._preparation.submit(command.job_id, command)

    def _on_failed(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        self._watch.on_used(job_id)
        self.sessions.report_failure(job_id, kind, message)
        self._end_trace(job_id, kind.value)

    def _on_ended(self, job_id: JobId) -> None:
        self._watch.on_used(job_id)
        self.sessions.leases.end(job_id)
        self._end_trace(job_id)

    def _send_event(self, event: events.Event) -> None:
        match event:
            case events.ReservationOpened(job_id, ticket, num_cached_tokens):
                self._traces.record_since_mark(
                    job_id, "reserve", attributes={"kvrelay.num_cached_tokens": num_cached_tokens}
                )
                reserved = decode_pb2.Reserved(
                    job_id=job_id_to_pb(job_id),
                    ticket=ticket,
                    push_address=self._push_address,
                    num_cached_tokens=num_cached_tokens,
                )
                self.sessions.send(job_id, reserved=reserved)
                self._watch.on_opened(job_id)
            case events.SequencesStarted(job_id):
                self._watch.on_used(job_id)
                self.sessions.add_kv_bytes(event.kv_bytes)
                self._trace_start(event)
                self.sessions.send(job_id, decode_started=_started_to_pb(event))
            case JobFailed(job_id, kind, message):
                self._on_failed(job_id, kind, message)

    def _trace_start(self, event: events.SequencesStarted) -> None:
        if event.prefill_ms:  # the prompt was computed here
            prefill_s, queue_s = (event.prefill_ms - event.queue_ms) / 1000, event.queue_ms / 1000
            self._traces.record(event.job_id, "prefill.queue", queue_s, prefill_s)
            self._traces.record(event.job_id, "prefill", prefill_s, attributes={"kvrelay.local": True})
        self._traces.mark(event.job_id, "decode")

    def _end_trace(self, job_id: JobId, problem: str = "") -> None:
        for name in ("reserve", "decode"):
            self._traces.record_since_mark(job_id, name, error=problem)
        self._traces.end(job_id)

    def _send_tokens(self, tokens: tuple[SequenceToken, ...]) -> None:
        """One message to each gateway."""
        by_session: dict[EventSink, list[session_pb2.SequenceToken]] = {}
        for token in tokens:
            session = self.sessions.leases.session_of(token.job_id)
            if session is not None:
                by_session.setdefault(session, []).append(sequence_token_to_pb(token))
        for session, messages in by_session.items():
            self.sessions.send_to(session, step_output=decode_pb2.StepOutput(tokens=messages))
        fault_point("decode.tokens_reported", tokens)


def _started_to_pb(event: events.SequencesStarted) -> decode_pb2.DecodeStarted:
    return decode_pb2.DecodeStarted(
        job_id=job_id_to_pb(event.job_id),
        kv_bytes=event.kv_bytes,
        num_transferred_tokens=event.num_transferred_tokens,
        prefill_ms=event.prefill_ms,
        queue_ms=event.queue_ms,
        chunks=map(chunk_time_to_pb, event.chunks),
    )
