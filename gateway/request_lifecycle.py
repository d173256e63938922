"""The life of one request as a function of events: events in, actions out. No clock, no task, no wire.

    Start ─► Route ─► Reserve ─► StartPrefill ─► first tokens ─► decode tokens ─► Finish
               ▲                └► RunPrompt ───────────────────────▲
               └─ a failure: cancel what is held, attempt + 1, prompt plus emitted tokens, other workers

Dropped is what concerns another attempt or unknown work, and what comes from a worker that does not have the work.
"""

from typing import assert_never

from gateway import lifecycle_messages as m
from gateway.prompt_placement import PlacePrompt
from gateway.retry_policy import RetryPolicy
from gateway.token_order import TokenGapError
from gateway.work_progress import WorkProgress
from kvrelay.errors import (
    CancelledRequestError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    KvrelayError,
    OverloadedError,
)
from kvrelay.request_state import RequestState, check_edge
from kvrelay.work import FailureKind, SequenceToken, Work, WorkId

REPORT_WAIT_MS = 250
"""How long the end of a request waits for the prefill worker's report on the transfer, which only its phases need."""
PEER_WAIT_MS = 250
"""How long a transfer that broke off waits for word of the other side: has it died of the request, that is to be known."""
SETTLE_WAIT_MS = 2000
"""How long a decode worker has to say that it has all KV when the prefill worker that sent it is gone."""

_PROGRESS = (
    RequestState.QUEUED,
    RequestState.RESERVING,
    RequestState.PREFILLING,
    RequestState.TRANSFERRING,
    RequestState.DECODING,
)


class RequestLifecycle:
    """State machine of one request.

    Args:
        request: the request, new or taken over.
        is_local_prompt: whether a prompt stays on its decode worker; asked when that has reserved its blocks.
        max_attempts: failed attempts after which the request fails; see RetryPolicy.
    """

    def __init__(self, request: m.LifecycleRequest, is_local_prompt: PlacePrompt, max_attempts: int) -> None:
        num_sequences = request.sampling.n
        self.attempt = request.attempt
        self.report = m.AttemptReport()
        self.emitted: list[list[int]] = [list(ids) for ids in request.emitted] or [[] for _ in range(num_sequences)]
        """Token ids of each sequence so far."""
        self._request = request
        self._is_local_prompt = is_local_prompt
        self._retries = RetryPolicy(max_attempts)
        self._state = RequestState.QUEUED
        self._finished = False
        self._waiting = False
        self._awaits_reports = False
        self._paused = False
        self._open = set(range(num_sequences)) - request.finished_sequences
        self._works: dict[WorkId, WorkProgress] = {}
        self._actions: list[m.Action] = []
        self._num_emitted_before = [len(ids) for ids in self.emitted]

    @property
    def finished(self) -> bool:
        """Whether Finish was among the actions."""
        return self._finished

    @property
    def state(self) -> RequestState:
        return self._state

    @property
    def suspected_worker_ids(self) -> frozenset[str]:
        """Workers that may have died of the request since it last got further."""
        return self._retries.suspected_worker_ids

    def may_be_in_step_of(self, worker_id: str) -> bool:
        """Whether that worker may be computing something of the request just now."""
        return not self._finished and any(progress.may_be_in_step_of(worker_id) for progress in self._works.values())

    def runs_alone_on(self, worker_id: str) -> bool:
        """Whether that worker computes something of the request just now, a suspect, and nothing else."""
        return not self._finished and any(progress.runs_alone_on(worker_id) for progress in self._works.values())

    def handle(self, event: m.Event) -> list[m.Action]:
        """Actions to take, in order. After Finish there are none."""
        if self._finished:
            return []
        self._actions = []
        self._dispatch(event)
        return self._actions

    def _dispatch(self, event: m.Event) -> None:
        match event:
            case m.DecodeTokens():  # first, for it is by far the most frequent
                self._on_decode_tokens(event)
            case m.Start():
                self._begin_attempt()
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
                self._end_early(RequestState.FAILED, _too_slow_error())
            case m.CancelRequested():
                self._end_early(RequestState.CANCELLED, CancelledRequestError("the request was cancelled"))
            case m.DeadlinePassed():
                self._end_early(RequestState.EXPIRED, _deadline_error())
            case _:
                assert_never(event)

    # --- routing --------------------------------------------------------------------------------------------------------------

    def _begin_attempt(self) -> None:
        self.report = m.AttemptReport()
        self._num_emitted_before = [len(ids) for ids in self.emitted]
        self._works = {work.work_id: WorkProgress(work) for work in self._make_works()}
        if self._works:
            self._route_waiting()
        else:
            self._complete()

    def _make_works(self) -> list[Work]:
        """One work for all sequences while their tokens are the same, that is none; else one for each open sequence."""
        num_sequences = self._request.sampling.n
        if not any(self.emitted) and len(self._open) == num_sequences:
            return [self._make_work(0, num_sequences)]
        return [self._make_work(sequence, 1) for sequence in sorted(self._open)]

    def _make_work(self, first_sequence: int, num_sequences: int) -> Work:
        prompt = self._request.prompt_token_ids
        return Work(
            work_id=WorkId(self._request.request_id, self.attempt, first_sequence),
            token_ids=prompt + tuple(self.emitted[first_sequence]),
            num_prompt_tokens=len(prompt),
            num_sequences=num_sequences,
            sampling=self._request.sampling,
            cache_salt=self._request.cache_salt,
            deadline_ms=0,
            runs_alone=self._retries.is_suspect,
        )

    def _route_waiting(self) -> None:
        """Asks for workers for works that have none; where they run alone, one after the other."""
        self._waiting = False
        for progress in self._works.values():
            if progress.waits_for_route:
                excluded, avoided = self._retries.excluded_worker_ids, self._retries.avoided_pairs
                self._actions.append(m.Route(progress.work, excluded, avoided, is_paid_retry=self._retries.is_due_to_pay))
            if progress.is_on_trial:
                return

    def _on_routed(self, event: m.Routed) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.waits_for_route:
            return
        self._retries.is_due_to_pay = False
        progress.route(event.decode_worker_id, event.prefill_worker_id)
        self.report.decode_worker_id = event.decode_worker_id
        self.report.prefill_worker_id = event.prefill_worker_id
        self._advance_to(RequestState.RESERVING)
        self._actions.append(m.SendReserve(event.decode_worker_id, progress.work))

    def _on_no_worker(self, event: m.NoWorker) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.waits_for_route or self._waiting:
            return
        self._waiting = True
        self._actions.append(m.RetryLater(self._retries.next_wait_ms()))

    def _on_give_up(self) -> None:
        if self._waiting:
            self._end(RequestState.FAILED, self._retries.error_of_waiting())

    # --- the handoff ----------------------------------------------------------------------------------------------------------

    def _on_reserved(self, event: m.Reserved) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.is_reserved_by(event.worker_id) or progress.prompt_started:
            return
        self.report.num_cached_tokens = min(event.num_cached_tokens, len(self._request.prompt_token_ids))
        num_uncached = len(progress.work.token_ids) - event.num_cached_tokens
        prefill_worker_id = progress.prefill_worker_id
        if prefill_worker_id is None or self._is_local_prompt(event.work_id, event.worker_id, prefill_worker_id, num_uncached):
            progress.begin_local_prompt()
            self.report.prefilled_on_decode_worker = True
            self.report.prefill_worker_id = None
            action: m.Action = m.SendRunPrompt(event.worker_id, event.work_id)
        else:
            progress.begin_prefill()
            action = m.SendStartPrefill(
                prefill_worker_id, progress.work, event.ticket, event.push_address, event.num_cached_tokens
            )
        self._advance_to(RequestState.PREFILLING)
        self._actions.append(action)

    def _on_prefill_done(self, event: m.PrefillDone) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.is_prefilled_by(event.worker_id) or progress.order.first_tokens_known:
            return
        self.report.queue_ms, self.report.prefill_ms = event.queue_ms, event.prefill_ms
        try:
            ready = progress.order.take_first(event.tokens)
        except TokenGapError:
            self._retry(FailureKind.INTERNAL, progress, event.worker_id)
            return
        if all(token.finish_reason is not None for token in event.tokens):
            progress.prefill_holds = False  # it pushes nothing; the decode worker is told by the cancel
        else:
            self._advance_to(RequestState.TRANSFERRING)
            for token in event.tokens:
                progress.note_worker_ended(token)
        self._emit(progress, ready)

    def _on_transfer_done(self, event: m.TransferDone) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.is_prefilled_by(event.worker_id):
            return
        progress.prefill_holds = False
        self.report.transfer_ms, self.report.exposed_ms = event.transfer_ms, event.exposed_ms
        self.report.wire_ms, self.report.transport = event.wire_ms, event.transport
        self.report.transfer_bytes = max(self.report.transfer_bytes, event.kv_bytes)
        self._complete_if_done()

    def _on_decode_started(self, event: m.DecodeStarted) -> None:
        progress = self._decoding(event.work_id, event.worker_id)
        if progress is None:
            return
        self.report.transfer_bytes = max(self.report.transfer_bytes, event.kv_bytes)
        if progress.prefill_worker_id is None:
            self.report.queue_ms, self.report.prefill_ms = event.queue_ms, event.prefill_ms
        if not progress.decode_started:
            self._start_decoding(progress)

    def _start_decoding(self, progress: WorkProgress) -> None:
        progress.decode_started = True
        self._advance_to(RequestState.DECODING)
        if self._paused:
            self._actions.extend(progress.set_paused(True))
        # Sequences that a stop string ended with their first token: the decode worker can be told only now.
        for sequence in progress.work.sequences:
            if sequence not in self._open:
                self._actions.extend(progress.finish_sequence(sequence))

    def _on_decode_tokens(self, event: m.DecodeTokens) -> None:
        for token in event.tokens:
            progress = self._decoding(token.work_id, event.worker_id)
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
            if self._finished:
                return

    def _decoding(self, work_id: WorkId, worker_id: str) -> WorkProgress | None:
        progress = self._works.get(work_id)
        if progress is None or not progress.is_reserved_by(worker_id) or not progress.prompt_started:
            return None
        return progress

    # --- tokens and ends ------------------------------------------------------------------------------------------------------

    def _emit(self, progress: WorkProgress, tokens: list[SequenceToken]) -> None:
        ended = False
        for token in tokens:
            if token.sequence not in self._open:
                continue
            assert token.index == len(self.emitted[token.sequence]), "tokens come in order"
            self.emitted[token.sequence].append(token.token.token_id)
            self._retries.note_progress()
            self._actions.append(m.Emit(token))
            if token.finish_reason is not None:
                self._open.discard(token.sequence)
                ended = True
        if not progress.has_passed:
            self._note_passed(progress)
        if ended:
            self._close_if_done(progress)

    def _note_passed(self, progress: WorkProgress) -> None:
        """Two tokens of one attempt: the workers have computed what the request was last seen at, prompt and decode step."""
        for sequence in self._open.intersection(progress.work.sequences):
            if len(self.emitted[sequence]) < self._num_emitted_before[sequence] + 2:
                return
        progress.has_passed = True
        if all(other.has_passed for other in self._works.values()):
            self._retries.note_survived()
        elif progress.work.runs_alone:
            self._route_waiting()
        if self._paused:
            self._actions.extend(progress.set_paused(True))

    def _on_stop_found(self, sequence: int) -> None:
        if sequence not in self._open:
            return
        self._open.discard(sequence)
        for progress in self._works.values():
            if sequence in progress.work.sequences:
                if progress.decode_started and not self._is_done(progress):
                    self._actions.extend(progress.finish_sequence(sequence))
                if not progress.has_passed:
                    self._note_passed(progress)
                self._close_if_done(progress)
                return

    def _on_readers_behind(self, behind: bool) -> None:
        self._paused = behind
        for progress in self._works.values():
            self._actions.extend(progress.set_paused(behind))

    def _is_done(self, progress: WorkProgress) -> bool:
        return self._open.isdisjoint(progress.work.sequences)

    def _close_if_done(self, progress: WorkProgress) -> None:
        if not self._is_done(progress):
            return
        self._actions.extend(progress.cancel_decode())
        if not progress.decode_started:
            self._actions.extend(progress.cancel_prefill())
        self._complete_if_done()

    def _complete_if_done(self) -> None:
        if self._open:
            return
        if not any(progress.prefill_holds for progress in self._works.values()):
            self._complete()
        elif not self._awaits_reports:
            self._awaits_reports = True
            self._actions.append(m.StartTimer(self.attempt, REPORT_WAIT_MS))

    def _complete(self) -> None:
        if self._state in (RequestState.QUEUED, RequestState.RESERVING):  # taken over after its last token
            self._advance_to(RequestState.PREFILLING)
        self._end(RequestState.SUCCEEDED, None)

    def _end_early(self, state: RequestState, error: KvrelayError) -> None:
        if self._open:
            self._end(state, error)
        else:
            self._complete()

    def _end(self, state: RequestState, error: KvrelayError | None) -> None:
        self._cancel_all()
        self._finished = True
        self._state = state
        self._actions.append(m.Finish(state, error))

    def _cancel_all(self) -> None:
        for progress in self._works.values():
            self._actions.extend(progress.cancel_decode())
            self._actions.extend(progress.cancel_prefill())

    # --- failures -------------------------------------------------------------------------------------------------------------

    def _on_work_failed(self, event: m.WorkFailed) -> None:
        progress = self._works.get(event.work_id)
        if progress is None or not progress.release_hold(event.worker_id):
            return
        if self._is_done(progress):
            self._complete_if_done()
        elif progress.can_spare(event.worker_id):
            return
        elif event.kind is FailureKind.INVALID:
            self._end(RequestState.FAILED, InvalidRequestError("prompt", f"cannot be served: {event.message}"))
        elif event.kind is FailureKind.DEADLINE:
            self._end(RequestState.EXPIRED, _deadline_error())
        elif event.kind is FailureKind.TRANSFER and progress.peer_may_have_died(event.worker_id):
            progress.settling = True
            self._actions.append(m.StartTimer(self.attempt, PEER_WAIT_MS))
        else:
            self._retry(event.kind, progress, event.worker_id)

    def _on_worker_lost(self, worker_id: str, blame: m.Blame) -> None:
        if blame is m.Blame.GUILTY and self._open:
            self._end(RequestState.FAILED, _quarantine_error())
            return
        if blame is m.Blame.SUSPECT:
            self._retries.note_suspicion(worker_id)
        affected = [progress for progress in self._works.values() if progress.release_hold(worker_id)]
        for progress in self._works.values():
            if worker_id == progress.prefill_worker_id and not progress.prompt_started:
                progress.prefill_worker_id = None
        for progress in affected:
            if self._is_done(progress) or progress.can_spare(worker_id):
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
        if not self._open:
            self._complete()
            return
        for progress in self._works.values():
            if progress.settling and not progress.decode_started and not self._is_done(progress):
                self._retry(FailureKind.TRANSFER, progress, progress.prefill_worker_id or "")
                return

    def _retry(self, kind: FailureKind | None, progress: WorkProgress, worker_id: str) -> None:
        """Gives the attempt up and begins the next one. `kind` None: the worker is gone."""
        self._cancel_all()
        error = self._retries.note_failure(kind, worker_id, progress.pair)
        if error is not None:
            self._end(RequestState.FAILED, error)
            return
        if kind is FailureKind.TRANSFER and progress.pair is not None:
            self._actions.append(m.AvoidPair(*progress.pair))
        self.attempt += 1
        self._state = RequestState.QUEUED
        self._actions.append(m.SetState(RequestState.QUEUED, self.attempt, None, None))
        self._begin_attempt()

    # --- states ---------------------------------------------------------------------------------------------------------------

    def _advance_to(self, state: RequestState) -> None:
        """Moves forward to the state, over the states between where no edge leads there; an attempt never goes back."""
        while _PROGRESS.index(self._state) < _PROGRESS.index(state):
            direct = check_edge(self._state, self.attempt, state, self.attempt)
            self._state = state if direct else _PROGRESS[_PROGRESS.index(self._state) + 1]
            decode, prefill = self.report.decode_worker_id, self.report.prefill_worker_id
            self._actions.append(m.SetState(self._state, self.attempt, decode, prefill))


def _quarantine_error() -> InternalError:
    return InternalError(
        "the request is quarantined: a worker died while it computed this request and perhaps others, and another one while it"
        " computed nothing else; it is not attempted again, and the workers' logs have the detail"
    )


def _too_slow_error() -> OverloadedError:
    return OverloadedError("the client reads its stream too slowly, and its tokens cannot be kept for ever; read faster")


def _deadline_error() -> DeadlineError:
    return DeadlineError("the request's deadline passed before it was done; allow more time, or ask for fewer tokens")
