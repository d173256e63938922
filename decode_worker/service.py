"""The decode worker towards gateways: commands of sessions go to the engine thread, its reports come back as events.

Runs on the event loop.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import Callable
from typing import Any

import grpc
import structlog

from decode_worker import commands, events
from decode_worker.metrics import DecodeMetrics
from kvrelay.fault_points import fault_point
from kvrelay.grammar import CompiledGrammar
from kvrelay.model_spec import ModelSpec
from kvrelay.response_format import ResponseFormat
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, session_pb2
from kvrelay.wire import chunk_time_to_pb, sequence_token_to_pb, work_id_from_pb, work_id_to_pb
from kvrelay.work import FailureKind, SequenceToken, Work, WorkId
from kvrelay.work_traces import WorkTraces
from kvrelay.worker_grammars import WorkPreparation, refuse_form
from kvrelay.worker_session import WorkerSession
from kvrelay.worker_sessions import WorkerSessions

_log = structlog.get_logger(__name__)

ENDS = (events.WorkEnded, events.WorkFailed)


class DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    """Serves sessions.

    Args:
        hello: who the worker is.
        model: the served model.
        push_address: host:port of this worker's KVTransferService.
        submit: to the engine thread.
        submit_work: the same for new works; False when its inbox is full.
        traces: spans of works; by default none.
        compile_form: called in threads, gives the grammar that a form is; by default refuses all.
    """

    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        model: ModelSpec,
        push_address: str,
        submit: Callable[[commands.Command], None],
        submit_work: Callable[[commands.Command], bool],
        traces: WorkTraces | None = None,
        compile_form: Callable[[ResponseFormat], CompiledGrammar] = refuse_form,
    ) -> None:
        self._model = model
        self._push_address = push_address
        self._submit = submit
        self._submit_work = submit_work
        self.metrics = DecodeMetrics()
        self._traces = traces or WorkTraces()
        self.sessions = WorkerSessions(hello, decode_pb2.DecodeServiceSessionResponse, model, self._give_up, self._fail)
        self._preparation = WorkPreparation(compile_form, self._report_failure)

    async def Session(  # type: ignore[override]  # a coroutine that writes to the context
        self, request_iterator: object, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self.sessions.serve(context, self.take_command)

    def report(self, report: events.StepReport) -> None:
        """What the engine thread has to say; called on the event loop, in order."""
        self.metrics.note_report(report)
        self.sessions.update_load(report.load)
        for event in report.events:
            self._send_event(event)
        if report.tokens:
            self._send_tokens(report.tokens)
        for event in report.events:
            if isinstance(event, events.WorkEnded):
                self.sessions.leases.end(event.work_id)
                self._end_trace(event.work_id)
        if any(isinstance(event, ENDS) for event in report.events) or not (report.events or report.tokens):
            # What was freed is news to the router, and perhaps nothing else tells of it.
            self.sessions.broadcast_load()

    def take_command(self, session: WorkerSession, name: str, message: Any) -> None:
        """A message of a session, by the name of its field."""
        match name:
            case "reserve":
                self._reserve(session, message)
            case "run_prompt":
                self._submit_own(session, commands.ComputePrompt(work_id_from_pb(message.work_id)))
            case "finish_sequence":
                self._submit_own(session, commands.EndSequence(work_id_from_pb(message.work_id), message.sequence))
            case "set_paused":
                self._submit_own(session, commands.SetPaused(work_id_from_pb(message.work_id), message.paused))
            case "cancel_work":
                self.sessions.cancel(session, work_id_from_pb(message.work_id))

    def _reserve(self, session: WorkerSession, message: decode_pb2.Reserve) -> None:
        if message.fingerprint != self._model.fingerprint:
            problem = "the worker serves another model than the one that was asked for"
            self.sessions.refuse(session, work_id_from_pb(message.work_id), FailureKind.INVALID, problem)
            return
        work = self.sessions.admit(session, message)
        if work is not None:
            self._traces.begin(work)
            self._traces.mark(work.work_id, "reserve")
            _log.debug("blocks are asked for", num_tokens=len(work.token_ids), **work.log_fields)
        fault_point("decode.work_received", work)
        if work is not None:
            self._preparation.prepare(work, self._submit_reservation)

    def _submit_reservation(self, work: Work) -> None:
        if not self._submit_work(commands.ReserveBlocks(work)):
            self._report_failure(work.work_id, FailureKind.OUT_OF_CAPACITY, "the worker's inbox is full")

    def _submit_own(
        self, session: WorkerSession, command: commands.ComputePrompt | commands.EndSequence | commands.SetPaused
    ) -> None:
        """Only the gateway whose work it is may command it."""
        if self.sessions.leases.session_of(command.work_id) is not session:
            return
        if not self._preparation.defer(command.work_id, lambda: self._submit(command)):
            self._submit(command)

    def _give_up(self, work_id: WorkId) -> None:
        if self._preparation.drop(work_id):
            self._end_trace(work_id)
        else:
            self._submit(commands.GiveUp(work_id))

    def _fail(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        if self._preparation.drop(work_id):
            self._report_failure(work_id, kind, message)
        else:
            self._submit(commands.Fail(work_id, kind, message))

    def _report_failure(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        self.sessions.report_failure(work_id, kind, message)
        self._end_trace(work_id, kind.value)

    def _send_event(self, event: events.Event) -> None:
        match event:
            case events.ReservationOpened(work_id, ticket, num_cached_tokens):
                self._traces.record_since_mark(work_id, "reserve", attributes={"kvrelay.num_cached_tokens": num_cached_tokens})
                reserved = decode_pb2.Reserved(
                    work_id=work_id_to_pb(work_id),
                    ticket=ticket,
                    push_address=self._push_address,
                    num_cached_tokens=num_cached_tokens,
                )
                self.sessions.send(work_id, reserved=reserved)
            case events.SequencesStarted(work_id):
                self.sessions.add_kv_bytes(event.kv_bytes)
                self._trace_start(event)
                self.sessions.send(work_id, decode_started=_started_to_pb(event))
            case events.WorkFailed(work_id, kind, message):
                self._report_failure(work_id, kind, message)

    def _trace_start(self, event: events.SequencesStarted) -> None:
        if event.prefill_ms:  # the prompt was computed here
            prefill_s, queue_s = (event.prefill_ms - event.queue_ms) / 1000, event.queue_ms / 1000
            self._traces.record(event.work_id, "prefill.queue", queue_s, prefill_s)
            self._traces.record(event.work_id, "prefill", prefill_s, attributes={"kvrelay.local": True})
        self._traces.mark(event.work_id, "decode")

    def _end_trace(self, work_id: WorkId, problem: str = "") -> None:
        for name in ("reserve", "decode"):
            self._traces.record_since_mark(work_id, name, error=problem)
        self._traces.end(work_id)

    def _send_tokens(self, tokens: tuple[SequenceToken, ...]) -> None:
        """One message for each gateway."""
        by_session: dict[WorkerSession, list[session_pb2.SequenceToken]] = {}
        for token in tokens:
            session = self.sessions.leases.session_of(token.work_id)
            if session is not None:
                by_session.setdefault(session, []).append(sequence_token_to_pb(token))
        for session, messages in by_session.items():
            self.sessions.send_to(session, step_output=decode_pb2.StepOutput(tokens=messages))
        fault_point("decode.tokens_reported", tokens)


def _started_to_pb(event: events.SequencesStarted) -> decode_pb2.DecodeStarted:
    return decode_pb2.DecodeStarted(
        work_id=work_id_to_pb(event.work_id),
        kv_bytes=event.kv_bytes,
        num_transferred_tokens=event.num_transferred_tokens,
        prefill_ms=event.prefill_ms,
        queue_ms=event.queue_ms,
        chunks=map(chunk_time_to_pb, event.chunks),
    )
