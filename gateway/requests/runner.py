"""Runs one request: feeds its lifecycle with events and carries out the actions, on the loop."""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from gateway.lifecycle import events
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.lifecycle import RequestLifecycle
from gateway.requests.admission import Admitted
from gateway.requests.cache_salts import CacheSalts
from gateway.requests.timers import RequestTimers
from gateway.routing.router import RouteQuery
from gateway.state.journal import RequestJournal
from gateway.streaming.readers import OutputReader, OutputReaders
from gateway.streaming.write_throttle import WriteThrottle
from gateway.telemetry.metrics import GatewayMetrics, attempt_cause
from gateway.telemetry.phase_clock import PhaseClock
from gateway.telemetry.request_trace import RequestTrace
from gateway.telemetry.timelines import Timelines
from gateway.text.detokenizer import Detokenizer
from gateway.workers.session_messages import Command
from gateway.workers.sessions import WorkerSessions
from kvrelay.config.settings import RequestSettings
from kvrelay.core.job import FinishReason, SequenceToken
from kvrelay.core.request_state import RequestState
from kvrelay.errors import InternalError, KvrelayError, QuotaError, UnavailableError
from kvrelay.observability.tracing import Tracing
from kvrelay.runtime.fault_points import fault_point

RELEASED_RETRY_MS = 100
SUMMARY_BYTES = 1024
"""About what Redis keeps of an ended request besides its output."""

_FAULT_POINTS = {
    events.SendReserve: "gateway.reserve_sent",
    events.SendStartPrefill: "gateway.start_prefill_sent",
    events.SendRunPrompt: "gateway.run_prompt_sent",
    events.SendCancel: "gateway.cancel_sent",
    events.SendFinishSequence: "gateway.finish_sequence_sent",
    events.SendSetPaused: "gateway.set_paused_sent",
}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunnerContext:
    settings: RequestSettings
    sessions: WorkerSessions
    throttle: WriteThrottle
    """Readers acquire it before each write."""
    metrics: GatewayMetrics
    timelines: Timelines
    salts: CacheSalts
    tracing: Tracing | None = None


class RequestRunner:
    """`journal` has the frames emitted before. `detokenizers` is None without a tokenizer.

    `on_ended` is called once and must not raise.
    """

    def __init__(
        self,
        request: GenerationRequest,
        lifecycle: RequestLifecycle,
        journal: RequestJournal,
        detokenizers: list[Detokenizer] | None,
        admitted: Admitted,
        context: RunnerContext,
        on_ended: Callable[["RequestRunner"], None],
    ) -> None:
        self.request = request
        self.lifecycle = lifecycle
        self.journal = journal
        self.output = journal.output
        num_tokens_before = tuple(map(len, request.emitted))
        self.timeline = context.timelines.begin(request.request_id, request.submit_time, num_tokens_before)
        self.throttle = context.throttle
        self._detokenizers = detokenizers
        self._admitted = admitted
        self._sessions = context.sessions
        self._settings = context.settings
        self._refusals = context.metrics.counting_refusals
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._clock = PhaseClock(request.submit_time)
        self._metrics = context.metrics.of_model(request.model)
        self._trace = RequestTrace(request.request_id, journal.trace, context.tracing)
        self._cause: events.Event | None = None
        self._reasons: dict[int, FinishReason] = self.output.finish_reasons()
        self._events: deque[events.Event] = deque()
        self._handling = False
        self._timers = RequestTimers()
        self._readers = OutputReaders(self.output, self._settings.max_unread_tokens)
        self._paused = False
        self._waits_for_turn = False
        self._paid_attempt = 0
        """The last one that the retry budget paid for."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def ended(self) -> bool:
        return self.output.ended

    @property
    def log_fields(self) -> dict[str, str | int]:
        return self._trace.log_fields(self.lifecycle.attempt)

    @property
    def waits(self) -> bool:
        return self._admitted.waits

    def start(self) -> None:
        self._timers.set(
            "deadline", max(self.request.deadline - self._loop.time(), 0.0), self.post, events.DeadlinePassed()
        )
        self._trace.begin_attempt(self.lifecycle.attempt, self._loop.time())
        _log.debug("request begins", num_prompt_tokens=len(self.request.prompt_token_ids), **self.log_fields)
        fault_point("gateway.admitted", self.request)
        self.post(events.Started())

    def cancel(self) -> None:
        self.post(events.CancelRequested())

    def release(self) -> None:
        """Leaves the request to another gateway. Readers get UNAVAILABLE; the state stays."""
        _log.info("request is left to another gateway", **self.log_fields)
        self.journal.released = True
        self.post(events.CancelRequested())

    def post(self, event: events.Event) -> None:
        """Never raises: a defect ends only this request."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._cause = event = self._events.popleft()
                self.timeline.on_event(event, self._loop.time())
                for action in self.lifecycle.handle(event):
                    self._act(action)
        except Exception:
            _log.exception("a request failed by a defect", **self.log_fields)
            self._end_by_defect()
        finally:
            self._handling = False

    # --- readers ---

    def open_reader(self, from_index: int = 0) -> OutputReader:
        """The caller closes it.

        A request without readers is cancelled; a resumable one after a grace period.
        """
        self._timers.drop("grace")
        self._admitted.set_unattended(False)
        reader = OutputReader(self, from_index)
        self._readers.add(reader)
        return reader

    def on_read(self, reader: OutputReader) -> None:
        self._readers.on_read(reader)
        if self._paused and self._readers.have_caught_up:
            self._pause(False)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        if paused:
            self._timers.set(
                "slow client", self._settings.slow_client_timeout_ms / 1000, self.post, events.ReadersTooSlow()
            )
        else:
            self._timers.drop("slow client")
        self.post(events.ReadersBehind(paused))

    def close_reader(self, reader: OutputReader) -> None:
        self._readers.remove(reader)
        if self._readers or self.ended:
            return
        if self._paused:
            self._pause(False)  # there is no reader to wait for
        if self._loop.time() >= self.request.deadline - 0.05:
            self.post(events.DeadlinePassed())  # gRPC ends the call at the same moment
        elif self.request.resumable:
            self._await_client()
        else:
            self.cancel()

    def _await_client(self) -> None:
        try:
            with self._refusals():
                self._admitted.set_unattended(True)
        except QuotaError as error:
            self.post(events.LeftByQuota(error))
        else:
            self._timers.set("grace", self._settings.resume_grace_ms / 1000, self.post, events.CancelRequested())

    # --- actions ---

    def _act(self, action: events.Action) -> None:
        if isinstance(action, events.Emit):  # by far the most frequent
            self._emit(action.token)
            return
        self.timeline.on_action(action, self._loop.time())
        match action:
            case events.Route():
                self._route(action)
            case events.SendReserve() | events.SendStartPrefill():
                job = replace(action.job, deadline_ms=self._remaining_ms(), trace=self._trace.for_workers)
                self._send(replace(action, job=job))
            case events.SendRunPrompt() | events.SendCancel() | events.SendFinishSequence() | events.SendSetPaused():
                self._send(action)
            case events.SetState(state, attempt, decode_worker_id, prefill_worker_id):
                self.journal.add_transition(state, attempt, decode_worker_id, prefill_worker_id)
                if state is RequestState.QUEUED:
                    self._on_retry(attempt)
            case events.RetryLater(delay_ms):
                self._wait_for_worker(delay_ms / 1000)
            case events.StartTimer(attempt, delay_ms):
                self._timers.set("attempt", delay_ms / 1000, self.post, events.TimerFired(attempt))
            case events.AvoidPair(decode_worker_id, prefill_worker_id):
                self._sessions.avoid_pair((decode_worker_id, prefill_worker_id))
            case events.Finish(state, error):
                self._finish(state, error)

    def _on_retry(self, attempt: int) -> None:
        cause = attempt_cause(self._cause)
        self._metrics.attempts[cause] += 1
        self._trace.begin_attempt(attempt, self._loop.time(), cause)
        _log.info("request is attempted again", cause=cause, **self.log_fields)

    def _route(self, action: events.Route) -> None:
        uses_budget = action.uses_budget and self._paid_attempt != action.job.job_id.attempt
        if uses_budget and not self._sessions.retry_budget.try_acquire(self._loop.time()):
            self._waits_for_turn = True
            self._events.append(events.NoWorker(action.job.job_id))
            return
        query = RouteQuery(
            self.request.fingerprint,
            len(action.job.token_ids),
            action.excluded_worker_ids,
            action.avoided_pairs | self._sessions.avoided_pairs(),
            self.request.preferred_decode_worker_id,
            on_one_worker=action.job.isolated,
            token_ids=action.job.token_ids,
            cache_salt=action.job.cache_salt,
            session_key=self.request.session_key,
        )
        assignment = self._sessions.choose(query, self.request_id)
        if assignment is None:
            if uses_budget:
                self._sessions.retry_budget.refund()
            self._events.append(events.NoWorker(action.job.job_id))
            return
        if uses_budget:
            self._paid_attempt = action.job.job_id.attempt
        self._timers.drop("give up")
        self._events.append(events.Routed(action.job.job_id, assignment.decode_worker_id, assignment.prefill_worker_id))

    def _wait_for_worker(self, delay_s: float) -> None:
        waits_for_turn = self._waits_for_turn
        self._waits_for_turn = False
        if waits_for_turn and self._sessions.has_decode_worker(self.request.fingerprint):
            # Workers are there and other requests go first: only the deadline bounds that.
            self._timers.drop("give up")
        elif "give up" not in self._timers:
            self._timers.set("give up", self._settings.worker_wait_ms / 1000, self.post, events.GiveUpWaiting())
        # Jitter, so that many requests do not ask the same worker at once.
        self._timers.set("route", delay_s * random.uniform(0.5, 1.0), self.post, events.RouteAgain())

    def workers_changed(self) -> bool:
        """Returns whether the request was waiting for a worker."""
        if "route" not in self._timers:
            return False
        self._timers.drop("route")
        self.post(events.RouteAgain())
        return True

    def _send(self, action: Command) -> None:
        if isinstance(action, events.SendStartPrefill | events.SendRunPrompt):
            self._clock.on_prompt_sent(self._loop.time())
            self._trace.on_prompt_sent(self._loop.time())
        if not self._sessions.send(action, self.request.fingerprint):
            self._events.append(events.WorkerLost(action.worker_id))
        fault_point(_FAULT_POINTS[type(action)], action)

    def _emit(self, token: SequenceToken) -> None:
        sequence = token.sequence
        if sequence in self._reasons:
            return  # a stop string ended it, and its event is on the way to the lifecycle
        text, reason = self._text_of(token)
        if reason is not None:
            self._reasons[sequence] = reason
        now = self._loop.time()
        self._admitted.count_output_token()
        self._metrics.record_token(self._clock.on_token(sequence, token.index, now))
        self.timeline.on_token(token, reason is not None, now)
        if self._admitted.on_first_token(now) and token.index == 0:
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
            self._events.append(events.StopFound(token.sequence))
            return piece.text, FinishReason.STOP
        if token.finish_reason is not None:
            return piece.text + detokenizer.flush(), token.finish_reason
        return piece.text, None

    # --- the end ---

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
            self._metrics.record_success(phases, reasons, report.num_cached_tokens, self.output.num_output_tokens)
        else:
            self.output.fail(error)
        self._close(state, error)

    def _error_of_released(self) -> UnavailableError:
        problem = "this gateway no longer runs the request"
        if self.request.resumable:  # another gateway runs it, or will
            return UnavailableError(f"{problem}; resume it at another one", RELEASED_RETRY_MS)
        return UnavailableError(f"{problem}; it is not resumable, so send it again, at another one")

    def _end_by_defect(self) -> None:
        if self.ended:
            return
        for action in self.lifecycle.handle(events.CancelRequested()):
            if isinstance(action, events.SendCancel):
                self._sessions.send(action, self.request.fingerprint)
        error = InternalError("internal error; the gateway's log has the detail")
        self.output.fail(error)
        self._close(RequestState.FAILED, error)

    def _close(self, state: RequestState, error: KvrelayError | None) -> None:
        self._timers.drop_all()
        self._events.clear()
        now = self._loop.time()
        if self._admitted.counts_bytes:
            num_kept = sum(len(frame.data) for frame in self.output.frames) if self.request.keeps_output else 0
            self._admitted.set_stored_bytes(SUMMARY_BYTES + num_kept)
        self._admitted.release(now)
        released = error is not None and self.journal.released
        self._metrics.record_end(state, error, now - self.request.submit_time, released=released)
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
        self.timeline.on_end(state, error, self._loop.time())
        if not released:
            self.journal.end(state, error)
        self._on_ended(self)

    def _remaining_ms(self) -> int:
        return max(int((self.request.deadline - self._loop.time()) * 1000), 1)
