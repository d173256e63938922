"""The life of one request as a function of events: events in, actions out. No clock, no task, no wire.

    Start ─► Route ─► Reserve ─► StartPrefill ─► first tokens ─► decode tokens ─► Finish
               ▲                └► RunPrompt ───────────────────────▲
               └─ a failure: cancel what is held, attempt + 1, prompt plus emitted tokens, other workers

Dropped is what concerns another attempt or unknown work, and what comes from a worker that does not have the work.
"""

from typing import assert_never

from gateway import lifecycle_messages as m
from gateway import request_ends
from gateway.attempt import Attempt
from gateway.prompt_placement import PlacePrompt
from gateway.retry_policy import RetryPolicy
from gateway.sequence_outputs import SequenceOutputs
from gateway.token_order import TokenGapError
from gateway.work_progress import WorkProgress
from kvrelay.errors import CancelledRequestError, InvalidRequestError, KvrelayError
from kvrelay.request_state import RequestState
from kvrelay.work import FailureKind, SequenceToken

REPORT_WAIT_MS = 250
"""How long the end of a request waits for the prefill worker's report on the transfer, which only its phases need."""
PEER_WAIT_MS = 250
"""How long a transfer that broke off waits for word of the other side: has it died of the request, that is to be known."""
SETTLE_WAIT_MS = 2000
"""How long a decode worker has to say that it has all KV when the prefill worker that sent it is gone."""


class RequestLifecycle:
    """State machine of one request.

    Args:
        request: the request, new or taken over.
        is_local_prompt: whether a prompt stays on its decode worker; asked when that has reserved its blocks.
        max_attempts: failed attempts after which the request fails; see RetryPolicy.
    """

    def __init__(self, request: m.LifecycleRequest, is_local_prompt: PlacePrompt, max_attempts: int) -> None:
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._outputs = SequenceOutputs(request)
        self._attempt = Attempt(request.attempt, ())
        self._is_local_prompt = is_local_prompt
        self._retries = RetryPolicy(max_attempts)
        self._end_state: RequestState | None = None
        self._waiting = False
        self._awaits_reports = False
        self._paused = False
        self._actions: list[m.Action] = []

    @property
    def finished(self) -> bool:
        """Whether Finish was among the actions."""
        return self._end_state is not None

    @property
    def state(self) -> RequestState:
        return self._end_state or self._attempt.state

    @property
    def attempt(self) -> int:
        """Number of the current attempt."""
        return self._attempt.number

    @property
    def report(self) -> m.AttemptReport:
        """What workers reported of the current attempt."""
        return self._attempt.report

    @property
    def emitted(self) -> list[list[int]]:
        """Token ids of each sequence so far."""
        return self._outputs.emitted

    @property
    def suspected_worker_ids(self) -> frozenset[str]:
        """Workers that may have died of the request since it last got further."""
        return self._retries.suspected_worker_ids

    def may_be_in_step_of(self, worker_id: str) -> bool:
        """Whether that worker may be computing something of the request just now."""
        return not self.finished and self._attempt.may_be_in_step_of(worker_id)

    def runs_alone_on(self, worker_id: str) -> bool:
        """Whether that worker computes something of the request just now, a suspect, and nothing else."""
        return not self.finished and self._attempt.runs_alone_on(worker_id)

    def handle(self, event: m.Event) -> list[m.Action]:
        """Actions to take, in order. After Finish there are none."""
        if self.finished:
            return []
        self._actions = []
        self._dispatch(event)
        return self._actions

    def _dispatch(self, event: m.Event) -> None:
        match event:
            case m.DecodeTokens():  # first, for it is by far the most frequent
                self._on_decode_tokens(event)
            case m.Start():
                self._begin_attempt(self.attempt)
            case m.Routed():
                self._on_routed(event)
            case m.NoWorker():
                self._on_no_worker(event)
            case m.RouteAgain():
                self._route_waiting()
            case m.GiveUpWaiting():
                self._on_give_up()
            case m.Reserved():
                self._on_reserved(event)
            case m.PrefillDone():
                self._on_prefill_done(event)
            case m.TransferDone():
                self._on_transfer_done(event)
            case m.DecodeStarted():
                self._on_decode_started(event)
            case m.WorkFailed():
                self._on_work_failed(event)
            case m.WorkerLost():
                self._on_worker_lost(event.worker_id, event.blame)
            case m.Cleared():
                self._retries.clear_suspicion(event.worker_id)
            case m.StopFound():
                self._on_stop_found(event.sequence)
            case m.TimerFired():
                self._on_timer(event.attempt)
            case m.ReadersBehind():
                self._on_readers_behind(event.behind)
            case m.ReadersTooSlow():
                self._end_early(RequestState.FAILED, request_ends.too_slow_error())
            case m.CancelRequested():
                self._end_early(RequestState.CANCELLED, CancelledRequestError("the request was cancelled"))
            case m.DeadlinePassed():
                self._end_early(RequestState.EXPIRED, request_ends.deadline_error())
            case _:
                assert_never(event)

    # --- routing --------------------------------------------------------------------------------------------------------------

    def _begin_attempt(self, number: int) -> None:
        works = self._outputs.begin_attempt(number, runs_alone=self._retries.is_suspect)
        self._attempt = Attempt(number, works)
        if self._outputs.open:
            self._route_waiting()
        else:
            self._complete()

    def _route_waiting(self) -> None:
        self._waiting = False
        self._actions.extend(self._attempt.routes(self._retries))

    def _on_routed(self, event: m.Routed) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.waits_for_route:
            return
        self._retries.is_due_to_pay = False
        progress.route(event.decode_worker_id, event.prefill_worker_id)
        self._attempt.report.decode_worker_id = event.decode_worker_id
        self._attempt.report.prefill_worker_id = event.prefill_worker_id
        self._actions.extend(self._attempt.advance_to(RequestState.RESERVING))
        self._actions.append(m.SendReserve(event.decode_worker_id, progress.work))

    def _on_no_worker(self, event: m.NoWorker) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.waits_for_route or self._waiting:
            return
        self._waiting = True
        self._actions.append(m.RetryLater(self._retries.next_wait_ms()))

    def _on_give_up(self) -> None:
        if self._waiting:
            self._end(RequestState.FAILED, self._retries.error_of_waiting())

    # --- the handoff ----------------------------------------------------------------------------------------------------------

    def _on_reserved(self, event: m.Reserved) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.is_reserved_by(event.worker_id) or progress.prompt_started:
            return
        self._attempt.report.num_cached_tokens = min(event.num_cached_tokens, self._num_prompt_tokens)
        num_uncached = len(progress.work.token_ids) - event.num_cached_tokens
        prefill_worker_id = progress.prefill_worker_id
        if prefill_worker_id is None or self._is_local_prompt(event.work_id, event.worker_id, prefill_worker_id, num_uncached):
            progress.begin_local_prompt()
            self._attempt.report.prefilled_on_decode_worker = True
            self._attempt.report.prefill_worker_id = None
            action: m.Action = m.SendRunPrompt(event.worker_id, event.work_id)
        else:
            progress.begin_prefill()
            action = m.SendStartPrefill(
                prefill_worker_id, progress.work, event.ticket, event.push_address, event.num_cached_tokens
            )
        self._actions.extend(self._attempt.advance_to(RequestState.PREFILLING))
        self._actions.append(action)

    def _on_prefill_done(self, event: m.PrefillDone) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.is_prefilled_by(event.worker_id) or progress.order.first_tokens_known:
            return
        self._attempt.report.queue_ms, self._attempt.report.prefill_ms = event.queue_ms, event.prefill_ms
        try:
            ready = progress.order.take_first(event.tokens)
        except TokenGapError:
            self._retry(FailureKind.INTERNAL, progress, event.worker_id)
            return
        if all(token.finish_reason is not None for token in event.tokens):
            progress.prefill_holds = False  # it pushes nothing; the decode worker is told by the cancel
        else:
            self._actions.extend(self._attempt.advance_to(RequestState.TRANSFERRING))
            for token in event.tokens:
                progress.note_worker_ended(token)
        self._emit(progress, ready)

    def _on_transfer_done(self, event: m.TransferDone) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.is_prefilled_by(event.worker_id):
            return
        progress.prefill_holds = False
        self._attempt.report.transfer_ms, self._attempt.report.exposed_ms = event.transfer_ms, event.exposed_ms
        self._attempt.report.wire_ms, self._attempt.report.transport = event.wire_ms, event.transport
        self._attempt.report.transfer_bytes = max(self._attempt.report.transfer_bytes, event.kv_bytes)
        self._complete_if_done()

    def _on_decode_started(self, event: m.DecodeStarted) -> None:
        progress = self._attempt.find_decoding(event.work_id, event.worker_id)
        if progress is None:
            return
        self._attempt.report.transfer_bytes = max(self._attempt.report.transfer_bytes, event.kv_bytes)
        if progress.prefill_worker_id is None:
            self._attempt.report.queue_ms, self._attempt.report.prefill_ms = event.queue_ms, event.prefill_ms
        if not progress.decode_started:
            self._start_decoding(progress)

    def _start_decoding(self, progress: WorkProgress) -> None:
        progress.decode_started = True
        self._actions.extend(self._attempt.advance_to(RequestState.DECODING))
        if self._paused:
            self._actions.extend(progress.set_paused(True))
        # Sequences that a stop string ended with their first token: the decode worker can be told only now.
        for sequence in progress.work.sequences:
            if sequence not in self._outputs.open:
                self._actions.extend(progress.finish_sequence(sequence))

    def _on_decode_tokens(self, event: m.DecodeTokens) -> None:
        for token in event.tokens:
            progress = self._attempt.find_decoding(token.work_id, event.worker_id)
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
                progress.note_worker_ended(token)
            self._emit(progress, ready)
            if self.finished:
                return

    # --- tokens and ends ------------------------------------------------------------------------------------------------------

    def _emit(self, progress: WorkProgress, tokens: list[SequenceToken]) -> None:
        ended = False
        for token in tokens:
            if token.sequence not in self._outputs.open:
                continue
            self._outputs.append(token)
            self._retries.note_progress()
            self._actions.append(m.Emit(token))
            ended = ended or token.finish_reason is not None
        if not progress.has_passed:
            self._note_passed(progress)
        if ended:
            self._close_if_done(progress)

    def _note_passed(self, progress: WorkProgress) -> None:
        """Notes if the workers have computed what the request was last seen at."""
        if not self._outputs.has_passed(progress.work):
            return
        progress.has_passed = True
        if self._attempt.has_passed:
            self._retries.note_survived()
        elif progress.work.runs_alone:
            self._route_waiting()
        if self._paused:
            self._actions.extend(progress.set_paused(True))

    def _on_stop_found(self, sequence: int) -> None:
        progress = self._attempt.work_of(sequence)
        if sequence not in self._outputs.open or progress is None:
            return
        self._outputs.open.discard(sequence)
        if progress.decode_started and not self._outputs.is_done(progress.work):
            self._actions.extend(progress.finish_sequence(sequence))
        if not progress.has_passed:
            self._note_passed(progress)
        self._close_if_done(progress)

    def _on_readers_behind(self, behind: bool) -> None:
        self._paused = behind
        self._actions.extend(self._attempt.set_paused(behind))

    def _close_if_done(self, progress: WorkProgress) -> None:
        if not self._outputs.is_done(progress.work):
            return
        self._actions.extend(progress.cancel_decode())
        if not progress.decode_started:
            self._actions.extend(progress.cancel_prefill())
        self._complete_if_done()

    def _complete_if_done(self) -> None:
        if self._outputs.open:
            return
        if not self._attempt.awaits_report:
            self._complete()
        elif not self._awaits_reports:
            self._awaits_reports = True
            self._actions.append(m.StartTimer(self.attempt, REPORT_WAIT_MS))

    def _complete(self) -> None:
        if self._attempt.state in (RequestState.QUEUED, RequestState.RESERVING):  # taken over after its last token
            self._actions.extend(self._attempt.advance_to(RequestState.PREFILLING))
        self._end(RequestState.SUCCEEDED, None)

    def _end_early(self, state: RequestState, error: KvrelayError) -> None:
        if self._outputs.open:
            self._end(state, error)
        else:
            self._complete()

    def _end(self, state: RequestState, error: KvrelayError | None) -> None:
        self._actions.extend(self._attempt.cancel())
        self._end_state = state
        self._actions.append(m.Finish(state, error))

    # --- failures -------------------------------------------------------------------------------------------------------------

    def _on_work_failed(self, event: m.WorkFailed) -> None:
        progress = self._attempt.find(event.work_id)
        if progress is None or not progress.release_hold(event.worker_id):
            return
        if self._outputs.is_done(progress.work):
            self._complete_if_done()
        elif progress.can_spare(event.worker_id):
            return
        elif event.kind is FailureKind.INVALID:
            self._end(RequestState.FAILED, InvalidRequestError("prompt", f"cannot be served: {event.message}"))
        elif event.kind is FailureKind.DEADLINE:
            self._end(RequestState.EXPIRED, request_ends.deadline_error())
        elif event.kind is FailureKind.TRANSFER and progress.peer_may_have_died(event.worker_id):
            progress.settling = True
            self._actions.append(m.StartTimer(self.attempt, PEER_WAIT_MS))
        else:
            self._retry(event.kind, progress, event.worker_id)

    def _on_worker_lost(self, worker_id: str, blame: m.Blame) -> None:
        if blame is m.Blame.GUILTY and self._outputs.open:
            self._end(RequestState.FAILED, request_ends.quarantine_error())
            return
        if blame is m.Blame.SUSPECT:
            self._retries.note_suspicion(worker_id)
        affected = [progress for progress in self._attempt if progress.release_hold(worker_id)]
        for progress in self._attempt:
            if worker_id == progress.prefill_worker_id and not progress.prompt_started:
                progress.prefill_worker_id = None
        for progress in affected:
            if self._outputs.is_done(progress.work) or progress.can_spare(worker_id):
                continue
            if worker_id == progress.prefill_worker_id and progress.order.first_tokens_known and progress.decode_holds:
                progress.settling = True
                self._actions.append(m.StartTimer(self.attempt, SETTLE_WAIT_MS))
            else:
                self._retry(None, progress, worker_id)
                return
        self._complete_if_done()

    def _on_timer(self, attempt: int) -> None:
        if attempt != self.attempt:
            return
        if not self._outputs.open:
            self._complete()
            return
        for progress in self._attempt:
            if progress.settling and not progress.is_settled and not self._outputs.is_done(progress.work):
                self._retry(FailureKind.TRANSFER, progress, progress.prefill_worker_id or "")
                return

    def _retry(self, kind: FailureKind | None, progress: WorkProgress, worker_id: str) -> None:
        """Gives the attempt up and begins the next one. `kind` None: the worker is gone."""
        self._actions.extend(self._attempt.cancel())
        error = self._retries.note_failure(kind, worker_id, progress.pair)
        if error is not None:
            self._end(RequestState.FAILED, error)
            return
        if kind is FailureKind.TRANSFER and progress.pair is not None:
            self._actions.append(m.AvoidPair(*progress.pair))
        number = self.attempt + 1
        self._actions.append(m.SetState(RequestState.QUEUED, number, None, None))
        self._begin_attempt(number)
