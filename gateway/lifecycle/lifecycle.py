"""The life of one request: `handle(event)` returns actions. Pure: no clock, task or wire.

    Started ──► QUEUED ──Routed──► RESERVING ──Reserved──► PREFILLING ──PrefillDone──► TRANSFERRING
                  ▲                                            │                            │
                  │                          DecodeStarted, DecodeTokens                    │
                  │ attempt + 1                                └──────► DECODING ◄──────────┘
                  │                                                        │
                  │                                             DecodeTokens, StopFound
                  │                                                        └──► SUCCEEDED
                  └── any active ──JobFailed, WorkerLost, TimerFired (after MAX_ATTEMPTS ──► FAILED)
                      any active ──CancelRequested──► CANCELLED      ──DeadlinePassed──► EXPIRED
                                 ──ReadersTooSlow, GiveUpWaiting, LeftByQuota──► FAILED

`kvrelay.core.request_state` has all edges. A new attempt's prompt is prompt plus emitted tokens.
Events of other attempts, and of workers that do not hold the job, are dropped.
"""

from typing import assert_never

from gateway.lifecycle import events
from gateway.lifecycle.attempt import Attempt, AttemptReport
from gateway.lifecycle.generation_request import GenerationRequest
from gateway.lifecycle.job_progress import JobProgress
from gateway.lifecycle.retry_policy import RetryPolicy, deadline_error, invalid_error, quarantine_error, too_slow_error
from gateway.lifecycle.sequence_outputs import SequenceOutputs
from gateway.lifecycle.token_order import TokenGapError
from gateway.routing.conditional_disaggregation import PrefillLocally
from kvrelay.core.job import FailureKind, SequenceToken
from kvrelay.core.request_state import RequestState
from kvrelay.errors import CancelledRequestError, KvrelayError

REPORT_WAIT_MS = 250
"""The end waits for the transfer's report."""
PEER_WAIT_MS = 250
"""A broken transfer waits for news of the peer, to blame the right worker."""
TRANSFER_ACK_WAIT_MS = 2000
"""Time for the decode worker to confirm all KV after its prefill worker is lost."""


class RequestLifecycle:
    """`prefill_locally` is asked once blocks are reserved."""

    def __init__(self, request: GenerationRequest, prefill_locally: PrefillLocally, max_attempts: int) -> None:
        self._outputs = SequenceOutputs(request)
        self._attempt = Attempt(request.attempt, ())
        self._prefill_locally = prefill_locally
        self._retries = RetryPolicy(max_attempts)
        self._end_state: RequestState | None = None
        self._waiting = False
        self._awaits_reports = False
        self._paused = False
        self._actions: list[events.Action] = []

    @property
    def finished(self) -> bool:
        return self._end_state is not None

    @property
    def state(self) -> RequestState:
        return self._end_state or self._attempt.state

    @property
    def attempt(self) -> int:
        return self._attempt.number

    @property
    def report(self) -> AttemptReport:
        return self._attempt.report

    @property
    def suspected_worker_ids(self) -> frozenset[str]:
        return self._retries.suspected_worker_ids

    def may_be_in_step_of(self, worker_id: str) -> bool:
        return not self.finished and self._attempt.may_be_in_step_of(worker_id)

    def is_isolated_on(self, worker_id: str) -> bool:
        return not self.finished and self._attempt.is_isolated_on(worker_id)

    def handle(self, event: events.Event) -> list[events.Action]:
        """Returns the actions in order; none after Finish."""
        if self.finished:
            return []
        self._actions = []
        self._dispatch(event)
        return self._actions

    def _dispatch(self, event: events.Event) -> None:
        match event:
            case events.DecodeTokens():  # first, because it is by far the most frequent
                self._on_decode_tokens(event)
            case events.Started():
                self._start_attempt(self.attempt)
            case events.Routed():
                self._actions += self._attempt.on_routed(event)
            case events.NoWorker():
                self._on_no_worker(event)
            case events.RouteAgain():
                self._route_waiting()
            case events.GiveUpWaiting():
                if self._waiting:
                    self._end(RequestState.FAILED, self._retries.waiting_error())
            case events.Reserved():
                self._actions += self._attempt.on_reserved(event, self._prefill_locally)
            case events.PrefillDone():
                self._on_prefill_done(event)
            case events.TransferDone():
                self._attempt.on_transfer_done(event)
                self._complete_if_done()
            case events.DecodeStarted():
                self._on_decode_started(event)
            case events.JobFailed():
                self._on_job_failed(event)
            case events.WorkerLost():
                self._on_worker_lost(event)
            case events.SuspicionCleared():
                self._retries.clear_suspicion(event.worker_id)
            case events.StopFound():
                self._on_stop_found(event.sequence)
            case events.TimerFired():
                self._on_timer(event.attempt)
            case events.ReadersBehind():
                self._paused = event.behind
                self._actions += self._attempt.set_paused(event.behind)
            case events.ReadersTooSlow():
                self._end_early(RequestState.FAILED, too_slow_error())
            case events.CancelRequested():
                self._end_early(RequestState.CANCELLED, CancelledRequestError("the request was cancelled"))
            case events.LeftByQuota(error):
                self._end_early(RequestState.FAILED, error)
            case events.DeadlinePassed():
                self._end_early(RequestState.EXPIRED, deadline_error())
            case _:
                assert_never(event)

    # --- routing ----------------------------------------------------------------------------------

    def _start_attempt(self, number: int) -> None:
        self._attempt = Attempt(number, self._outputs.begin_attempt(number, isolated=self._retries.is_suspect))
        if self._outputs.open:
            self._route_waiting()
        else:
            self._complete()

    def _route_waiting(self) -> None:
        self._waiting = False
        self._actions += self._attempt.routes(self._retries)

    def _on_no_worker(self, event: events.NoWorker) -> None:
        progress = self._attempt.find(event.job_id)
        if progress is None or not progress.waits_for_route or self._waiting:
            return
        self._waiting = True
        self._actions.append(events.RetryLater(self._retries.next_wait_ms()))

    # --- the handoff ------------------------------------------------------------------------------

    def _on_prefill_done(self, event: events.PrefillDone) -> None:
        progress = self._attempt.find(event.job_id)
        if progress is None or not progress.is_prefilled_by(event.worker_id) or progress.order.first_tokens_known:
            return
        self.report.record_prompt(event)
        try:
            ready = progress.order.take_first(event.tokens)
        except TokenGapError:
            self._retry(FailureKind.INTERNAL, progress, event.worker_id)
            return
        if all(token.finish_reason is not None for token in event.tokens):
            progress.prefill_holds = False  # it pushes nothing; the cancel tells the decode worker
        else:
            self._actions += self._attempt.advance_to(RequestState.TRANSFERRING)
            for token in event.tokens:
                if token.finish_reason is not None:
                    progress.on_worker_ended(token.sequence)
        self._emit(progress, ready)

    def _on_decode_started(self, event: events.DecodeStarted) -> None:
        progress = self._attempt.find_decoding(event.job_id, event.worker_id)
        if progress is None:
            return
        self.report.record_kv_bytes(event.kv_bytes)
        if progress.prefill_worker_id is None:
            self.report.record_prompt(event)
        if not progress.decode_started:
            self._start_decoding(progress)

    def _start_decoding(self, progress: JobProgress) -> None:
        progress.decode_started = True
        self._actions += self._attempt.advance_to(RequestState.DECODING)
        if self._paused:
            self._actions += progress.set_paused(True)
        # A stop string in a first token may have ended a sequence before the decode worker ran it.
        for sequence in progress.job.sequences:
            if sequence not in self._outputs.open:
                self._actions += progress.finish_sequence(sequence)

    def _on_decode_tokens(self, event: events.DecodeTokens) -> None:
        for token in event.tokens:
            progress = self._attempt.find_decoding(token.job_id, event.worker_id)
            if progress is None:
                continue
            if not progress.decode_started:
                self._start_decoding(progress)
            try:
                ready = progress.order.take_next(token)
            except TokenGapError:
                self._retry(FailureKind.INTERNAL, progress, event.worker_id)
                return
            if token.finish_reason is not None:
                progress.on_worker_ended(token.sequence)
            self._emit(progress, ready)
            if self.finished:
                return

    # --- tokens and ends --------------------------------------------------------------------------

    def _emit(self, progress: JobProgress, tokens: list[SequenceToken]) -> None:
        ended = False
        for token in tokens:
            if token.sequence not in self._outputs.open:
                continue
            self._outputs.append(token)
            self._retries.on_token()
            self._actions.append(events.Emit(token))
            ended = ended or token.finish_reason is not None
        if not progress.has_passed:
            self._check_progress(progress)
        if ended:
            self._close_if_done(progress)

    def _check_progress(self, progress: JobProgress) -> None:
        """Ends suspicion and isolation once this attempt outlives the last."""
        if progress.has_passed or not self._outputs.has_passed(progress.job):
            return
        progress.has_passed = True
        if self._attempt.has_passed:
            self._retries.on_survived()
        elif progress.job.isolated:
            self._route_waiting()
        if self._paused:
            self._actions += progress.set_paused(True)

    def _on_stop_found(self, sequence: int) -> None:
        progress = self._attempt.job_of(sequence)
        if sequence not in self._outputs.open or progress is None:
            return
        self._outputs.open.discard(sequence)
        if progress.decode_started and not self._outputs.is_done(progress.job):
            self._actions += progress.finish_sequence(sequence)
        self._check_progress(progress)
        self._close_if_done(progress)

    def _close_if_done(self, progress: JobProgress) -> None:
        if not self._outputs.is_done(progress.job):
            return
        self._actions += progress.cancel_decode()
        if not progress.decode_started:
            self._actions += progress.cancel_prefill()
        self._complete_if_done()

    def _complete_if_done(self) -> None:
        if self._outputs.open:
            return
        if not self._attempt.awaits_report:
            self._complete()
        elif not self._awaits_reports:
            self._awaits_reports = True
            self._actions.append(events.StartTimer(self.attempt, REPORT_WAIT_MS))

    def _complete(self) -> None:
        # A request may be taken over after its last token.
        if self._attempt.state in (RequestState.QUEUED, RequestState.RESERVING):
            self._actions += self._attempt.advance_to(RequestState.PREFILLING)
        self._end(RequestState.SUCCEEDED, None)

    def _end_early(self, state: RequestState, error: KvrelayError) -> None:
        if self._outputs.open:
            self._end(state, error)
        else:
            self._complete()

    def _end(self, state: RequestState, error: KvrelayError | None) -> None:
        self._actions += self._attempt.cancel()
        self._end_state = state
        self._actions.append(events.Finish(state, error))

    # --- failures ---------------------------------------------------------------------------------

    def _on_job_failed(self, event: events.JobFailed) -> None:
        progress = self._attempt.find(event.job_id)
        if progress is None or not progress.release_hold(event.worker_id):
            return
        if self._outputs.is_done(progress.job):
            self._complete_if_done()
        elif progress.can_spare(event.worker_id):
            return
        elif event.kind is FailureKind.INVALID:
            self._end(RequestState.FAILED, invalid_error(event.message))
        elif event.kind is FailureKind.DEADLINE:
            self._end(RequestState.EXPIRED, deadline_error())
        elif event.kind is FailureKind.TRANSFER and progress.peer_may_have_died(event.worker_id):
            self._await_transfer_ack(progress, PEER_WAIT_MS)
        else:
            self._retry(event.kind, progress, event.worker_id)

    def _on_worker_lost(self, event: events.WorkerLost) -> None:
        worker_id = event.worker_id
        if event.verdict is events.CrashVerdict.CONFIRMED and self._outputs.open:
            self._end(RequestState.FAILED, quarantine_error())
            return
        if event.verdict is events.CrashVerdict.SUSPECTED:
            self._retries.on_suspected(worker_id)
        for progress in self._attempt.release_worker(worker_id):
            if self._outputs.is_done(progress.job) or progress.can_spare(worker_id):
                continue
            is_prefilled = worker_id == progress.prefill_worker_id and progress.order.first_tokens_known
            if not is_prefilled or not progress.decode_holds:
                self._retry(None, progress, worker_id)
                return
            self._await_transfer_ack(progress, TRANSFER_ACK_WAIT_MS)
        self._complete_if_done()

    def _await_transfer_ack(self, progress: JobProgress, wait_ms: int) -> None:
        progress.awaiting_transfer_ack = True
        self._actions.append(events.StartTimer(self.attempt, wait_ms))

    def _on_timer(self, attempt: int) -> None:
        if attempt != self.attempt:
            return
        if not self._outputs.open:
            self._complete()
            return
        for progress in self._attempt:
            if progress.lacks_transfer_ack and not self._outputs.is_done(progress.job):
                self._retry(FailureKind.TRANSFER, progress, progress.prefill_worker_id or "")
                return

    def _retry(self, kind: FailureKind | None, progress: JobProgress, worker_id: str) -> None:
        """`kind` is None when the worker was lost."""
        self._actions += self._attempt.cancel()
        error = self._retries.on_failure(kind, worker_id, progress.pair)
        if error is not None:
            self._end(RequestState.FAILED, error)
            return
        if kind is FailureKind.TRANSFER and progress.pair is not None:
            self._actions.append(events.AvoidPair(*progress.pair))
        number = self.attempt + 1
        self._actions.append(events.SetState(RequestState.QUEUED, number, None, None))
        self._start_attempt(number)
