"""Runs one request: feeds its lifecycle with events, carries out the actions, and owns its timers, text, output and readers.

Events are handled at once, on the loop, one after the other; nothing here waits. Owns no task.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import structlog

from gateway import lifecycle_messages as m
from gateway.admission import Admitted
from gateway.detokenizer import Detokenizer
from gateway.generation_request import GenerationRequest
from gateway.metrics import ModelMetrics, attempt_cause
from gateway.output_readers import OutputReader, OutputReaders
from gateway.phase_clock import PhaseClock
from gateway.request_journal import RequestJournal
from gateway.request_lifecycle import RequestLifecycle
from gateway.request_output import RequestOutput
from gateway.request_timeline import RequestTimeline
from gateway.request_timers import RequestTimers
from gateway.request_trace import RequestTrace
from gateway.router import RouteQuery
from gateway.session_messages import Command
from gateway.turnstile import Turnstile
from gateway.worker_sessions import WorkerSessions
from kvrelay.config import RelaySettings
from kvrelay.errors import InternalError, KvrelayError, UnavailableError
from kvrelay.fault_points import fault_point
from kvrelay.request_state import RequestState
from kvrelay.work import FinishReason, SequenceToken

RELEASED_RETRY_MS = 100

_FAULT_POINTS = {
    m.SendReserve: "gateway.reserve_sent",
    m.SendStartPrefill: "gateway.start_prefill_sent",
    m.SendRunPrompt: "gateway.run_prompt_sent",
    m.SendCancel: "gateway.cancel_sent",
    m.SendFinishSequence: "gateway.finish_sequence_sent",
    m.SendSetPaused: "gateway.set_paused_sent",
}

_log = structlog.get_logger(__name__)


class RequestRunner:
    """One request of this gateway, from admission to its end.

    Args:
        request: what to run.
        lifecycle: new, or of a request that is taken over.
        output: with the frames that were emitted before.
        detokenizers: one for each sequence, after the tokens emitted before; None for a model whose tokenizer cannot be had.
        journal: where moves are noted for the store.
        timeline: where it is remembered what happened when.
        admitted: the request's share of the gateway's bounds.
        sessions: the workers.
        settings: waiting times.
        turnstile: that readers pass.
        on_end: called once, after the terminal; must not raise.
        metrics: where the requests of its model are counted.
        trace: that the request is part of.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        lifecycle: RequestLifecycle,
        output: RequestOutput,
        detokenizers: list[Detokenizer] | None,
        journal: RequestJournal,
        timeline: RequestTimeline,
        admitted: Admitted,
        sessions: WorkerSessions,
        settings: RelaySettings,
        turnstile: Turnstile,
        on_end: Callable[["RequestRunner"], None],
        metrics: ModelMetrics | None = None,
        trace: RequestTrace | None = None,
    ) -> None:
        self.request = request
        self.lifecycle = lifecycle
        self.output = output
        self.journal = journal
        self.timeline = timeline
        self.turnstile = turnstile
        self._detokenizers = detokenizers
        self._admitted = admitted
        self._sessions = sessions
        self._settings = settings
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._clock = PhaseClock(request.submit_time)
        self._metrics = metrics or ModelMetrics()
        self._trace = trace or RequestTrace(request.request_id)
        self._cause: m.Event | None = None
        """The event that is being handled."""
        self._reasons: dict[int, FinishReason] = output.finish_reasons()
        self._events: deque[m.Event] = deque()
        self._handling = False
        self._timers = RequestTimers()
        self._readers = OutputReaders(output, settings.max_unread_tokens)
        self._paused = False
        self._waits_for_turn = False
        self._paid_attempt = 0
        """The last attempt that the retry budget has paid for, with all its works."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def ended(self) -> bool:
        return self.output.ended

    @property
    def log_fields(self) -> dict[str, str | int]:
        """What a line of the log about it has."""
        return self._trace.log_fields(self.lifecycle.attempt)

    @property
    def waits(self) -> bool:
        """Whether it has no first token yet."""
        return self._admitted.waits

    def start(self) -> None:
        """Begins the first attempt; the deadline runs from now on."""
        self._timers.set("deadline", max(self.request.deadline - self._loop.time(), 0.0), self.post, m.DeadlinePassed())
        self._trace.begin_attempt(self.lifecycle.attempt, self._loop.time())
        _log.debug("request begins", num_prompt_tokens=len(self.request.prompt_token_ids), **self.log_fields)
        fault_point("gateway.admitted", self.request)
        self.post(m.Start())

    def cancel(self) -> None:
        """Somebody wants no more of it."""
        self.post(m.CancelRequested())

    def release(self) -> None:
        """The request goes on at another gateway, or may. Workers are freed, readers get UNAVAILABLE, the state stays."""
        _log.info("request is left to another gateway", **self.log_fields)
        self.journal.released = True
        self.post(m.CancelRequested())

    def post(self, event: m.Event) -> None:
        """Handles an event and all that follows from it. Never raises: a defect ends this request only."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._cause = event = self._events.popleft()
                self.timeline.note_event(event, self._loop.time())
                for action in self.lifecycle.handle(event):
                    self._act(action)
        except Exception:
            _log.exception("a request failed by a defect", **self.log_fields)
            self._end_by_defect()
        finally:
            self._handling = False

    # --- readers --------------------------------------------------------------------------------------------------------------

    def open_reader(self, from_index: int = 0) -> OutputReader:
        """A client's view of the output. Close it: a request that nobody reads is cancelled, a resumable one after a while."""
        self._timers.drop("grace")
        reader = OutputReader(self, from_index)
        self._readers.add(reader)
        return reader

    def note_read(self, reader: OutputReader) -> None:
        """A reader has got further."""
        self._readers.note_read(reader)
        if self._paused and self._readers.have_caught_up:
            self._pause(False)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if paused:
            self._timers.set("slow client", self._settings.slow_client_timeout_ms / 1000, self.post, m.ReadersTooSlow())
        else:
            self._timers.drop("slow client")
        self.post(m.ReadersBehind(paused))

    def close_reader(self, reader: OutputReader) -> None:
        """A reader reads no more."""
        self._readers.remove(reader)
        if self._readers or self.ended:
            return
        if self._paused:
            self._pause(False)  # nobody is waited for any more
        if self._loop.time() >= self.request.deadline - 0.05:
            self.post(m.DeadlinePassed())  # gRPC ends the call at the same moment
        elif self.request.resumable:
            self._timers.set("grace", self._settings.resume_grace_ms / 1000, self.post, m.CancelRequested())
        else:
            self.cancel()

    # --- actions --------------------------------------------------------------------------------------------------------------

    def _act(self, action: m.Action) -> None:
        if isinstance(action, m.Emit):  # by far the most frequent
            self._emit(action.token)
            return
        self.timeline.note_action(action, self._loop.time())
        match action:
            case m.Route():
                self._route(action)
            case m.SendReserve() | m.SendStartPrefill():
                work = replace(action.work, deadline_ms=self._remaining_ms(), trace=self._trace.for_workers)
                self._send(replace(action, work=work))
            case m.SendRunPrompt() | m.SendCancel() | m.SendFinishSequence() | m.SendSetPaused():
                self._send(action)
            case m.SetState(state, attempt, decode_worker_id, prefill_worker_id):
                self.journal.move(state, attempt, decode_worker_id, prefill_worker_id)
                if state is RequestState.QUEUED:
                    self._note_retry(attempt)
            case m.RetryLater(delay_ms):
                self._wait_for_worker(delay_ms / 1000)
            case m.StartTimer(attempt, delay_ms):
                self._timers.set("attempt", delay_ms / 1000, self.post, m.TimerFired(attempt))
            case m.AvoidPair(decode_worker_id, prefill_worker_id):
                self._sessions.avoid_pair((decode_worker_id, prefill_worker_id))
            case m.Finish(state, error):
                self._finish(state, error)

    def _note_retry(self, attempt: int) -> None:
        cause = attempt_cause(self._cause)
        self._metrics.attempts[cause] += 1
        self._trace.begin_attempt(attempt, self._loop.time(), cause)
        _log.info("request is attempted again", cause=cause, **self.log_fields)

    def _route(self, action: m.Route) -> None:
        is_paid = action.is_paid_retry and self._paid_attempt != action.work.work_id.attempt
        if is_paid and not self._sessions.retries.can_afford(self._loop.time()):
            self._waits_for_turn = True
            self._events.append(m.NoWorker(action.work.work_id))
            return
        query = RouteQuery(
            self.request.fingerprint,
            len(action.work.token_ids),
            action.excluded_worker_ids,
            action.avoided_pairs | self._sessions.avoided_pairs(),
            self.request.preferred_decode_worker_id,
            on_one_worker=action.work.runs_alone,
        )
        assignment = self._sessions.choose(query, self.request_id)
        if assignment is None:
            self._events.append(m.NoWorker(action.work.work_id))
            return
        if is_paid:
            self._sessions.retries.spend()
            self._paid_attempt = action.work.work_id.attempt
        self._timers.drop("give up")
        self._events.append(m.Routed(action.work.work_id, assignment.decode_worker_id, assignment.prefill_worker_id))

    def _wait_for_worker(self, delay_s: float) -> None:
        waits_for_turn = self._waits_for_turn
        self._waits_for_turn = False
        if waits_for_turn and self._sessions.has_decode_worker(self.request.fingerprint):
            self._timers.drop("give up")  # workers are there, and others are tried before it: only its deadline bounds that
        elif "give up" not in self._timers:
            self._timers.set("give up", self._settings.worker_wait_ms / 1000, self.post, m.GiveUpWaiting())
        # Jitter, so that many requests do not ask the same worker at once.
        self._timers.set("route", delay_s * random.uniform(0.5, 1.0), self.post, m.RouteAgain())

    def workers_changed(self) -> bool:
        """A worker was found, or has room: need not wait any longer. Whether it did wait."""
        if "route" not in self._timers:
            return False
        self._timers.drop("route")
        self.post(m.RouteAgain())
        return True

    def _send(self, action: Command) -> None:
        if isinstance(action, m.SendStartPrefill | m.SendRunPrompt):
            self._clock.note_prompt_sent(self._loop.time())
            self._trace.note_prompt_sent(self._loop.time())
        if not self._sessions.send(action, self.request.fingerprint):
            self._events.append(m.WorkerLost(action.worker_id))
        fault_point(_FAULT_POINTS[type(action)], action)

    def _emit(self, token: SequenceToken) -> None:
        sequence = token.sequence
        if sequence in self._reasons:
            return  # a stop string ended it; the lifecycle learns that from an event that is on its way
        text, reason = self._text_of(token)
        if reason is not None:
            self._reasons[sequence] = reason
        now = self._loop.time()
        self._metrics.note_token(self._clock.note_token(sequence, token.index, now))
        self.timeline.note_token(token, reason is not None, now)
        if self._admitted.note_first_token(now) and token.index == 0:
            self._metrics.first_token.observe(now - self.request.submit_time)
        self.output.append_delta(sequence, token.index, token.token, text, reason)
        if not self._paused and self._readers.are_behind:
            self._pause(True)
        fault_point("gateway.token_emitted", token)

    def _text_of(self, token: SequenceToken) -> tuple[str, FinishReason | None]:
        if self._detokenizers is None:
            return "", token.finish_reason
        detokenizer = self._detokenizers[token.sequence]
        piece = detokenizer.add(token.token.token_id)
        if piece.stopped:
            self._events.append(m.StopFound(token.sequence))
            return piece.text, FinishReason.STOP
        if token.finish_reason is not None:
            return piece.text + detokenizer.flush(), token.finish_reason
        return piece.text, None

    # --- the end --------------------------------------------------------------------------------------------------------------

    def _finish(self, state: RequestState, error: KvrelayError | None) -> None:
        fault_point("gateway.request_ends", self.request)
        now = self._loop.time()
        if self.journal.released and error is not None:
            error = self._error_of_released()
        if error is None:
            report = self.lifecycle.report
            reasons = [self._reasons[sequence] for sequence in range(self.request.sampling.n)]
            phases = self._clock.phases(report, self.lifecycle.attempt, now)
            self.timeline.phases = phases
            self.output.finish(reasons, len(self.request.prompt_token_ids), report.num_cached_tokens, phases)
            self._metrics.note_succeeded(phases, reasons, report.num_cached_tokens, self.output.num_output_tokens)
        else:
            self.output.fail(error)
        self._close(state, error)

    def _error_of_released(self) -> UnavailableError:
        problem = "this gateway does not run the request any more"
        if self.request.resumable:  # somebody does, or will: none of the gateways that say so has the last word
            return UnavailableError(f"{problem}; resume it at another one", RELEASED_RETRY_MS)
        return UnavailableError(f"{problem}; it is not resumable, so send it again, at another one")

    def _end_by_defect(self) -> None:
        if self.ended:
            return
        for action in self.lifecycle.handle(m.CancelRequested()):
            if isinstance(action, m.SendCancel):
                self._sessions.send(action, self.request.fingerprint)
        error = InternalError("internal error; the gateway's log has the detail")
        self.output.fail(error)
        self._close(RequestState.FAILED, error)

    def _close(self, state: RequestState, error: KvrelayError | None) -> None:
        self._timers.drop_all()
        self._events.clear()
        now = self._loop.time()
        self._admitted.release(now)
        released = error is not None and self.journal.released
        self._metrics.note_ended(state, error, now - self.request.submit_time, released=released)
        self._trace.end(
            state,
            error,
            self.request.submit_time,
            now,
            {
                "gen_ai.request.model": self.request.model,
                "gen_ai.usage.input_tokens": len(self.request.prompt_token_ids),
                "gen_ai.usage.output_tokens": self.output.num_output_tokens,
            },
        )
        reason = None if error is None else error.reason
        _log.debug("request ended", state=state.value, reason=reason, **self.log_fields)
        self._sessions.forget(self.request_id)
        self.timeline.note_end(state, error, self._loop.time())
        if not released:
            self.journal.end(state, error)
        self._on_end(self)

    def _remaining_ms(self) -> int:
        return max(int((self.request.deadline - self._loop.time()) * 1000), 1)
