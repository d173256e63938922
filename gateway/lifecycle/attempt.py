"""One attempt: its jobs, state and report. It only moves forward. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gateway.lifecycle import events
from gateway.lifecycle.job_progress import JobProgress
from gateway.lifecycle.retry_policy import RetryPolicy
from gateway.routing.conditional_disaggregation import PrefillLocally
from kvrelay.core.job import Job, JobId
from kvrelay.core.request_state import RequestState, check_edge

_PROGRESS = (
    RequestState.QUEUED,
    RequestState.RESERVING,
    RequestState.PREFILLING,
    RequestState.TRANSFERRING,
    RequestState.DECODING,
)


@dataclass(slots=True)
class AttemptReport:
    num_cached_tokens: int = 0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    exposed_ms: float = 0.0
    wire_ms: float = 0.0
    transfer_bytes: int = 0
    transport: str = ""
    prefilled_on_decode_worker: bool = False
    prefill_worker_id: str | None = None
    decode_worker_id: str | None = None

    def set_workers(self, event: events.Routed) -> None:
        self.decode_worker_id, self.prefill_worker_id = event.decode_worker_id, event.prefill_worker_id

    def set_local_prefill(self) -> None:
        self.prefilled_on_decode_worker = True
        self.prefill_worker_id = None

    def record_prompt(self, event: events.PrefillDone | events.DecodeStarted) -> None:
        self.queue_ms, self.prefill_ms = event.queue_ms, event.prefill_ms

    def record_kv_bytes(self, kv_bytes: int) -> None:
        """Both workers of a transfer report its size."""
        self.transfer_bytes = max(self.transfer_bytes, kv_bytes)

    def record_transfer(self, event: events.TransferDone) -> None:
        self.transfer_ms, self.exposed_ms, self.wire_ms = event.transfer_ms, event.exposed_ms, event.wire_ms
        self.transport = event.transport
        self.record_kv_bytes(event.kv_bytes)


class Attempt:
    """Has one job, or one for each sequence that has not ended."""

    def __init__(self, number: int, jobs: Iterable[Job]) -> None:
        self.number = number
        self.state = RequestState.QUEUED
        self.report = AttemptReport()
        self._jobs = {job.job_id: JobProgress(job) for job in jobs}

    def __iter__(self) -> Iterator[JobProgress]:
        return iter(self._jobs.values())

    def find(self, job_id: JobId) -> JobProgress | None:
        return self._jobs.get(job_id)

    def find_decoding(self, job_id: JobId, worker_id: str) -> JobProgress | None:
        """Returns the job if this worker may report its decode tokens."""
        progress = self._jobs.get(job_id)
        if progress is None or not progress.is_reserved_by(worker_id) or not progress.prompt_started:
            return None
        return progress

    def job_of(self, sequence: int) -> JobProgress | None:
        """Returns None for a sequence that ended in an earlier attempt."""
        return next((progress for progress in self if sequence in progress.job.sequences), None)

    @property
    def has_passed(self) -> bool:
        return all(progress.has_passed for progress in self)

    @property
    def awaits_report(self) -> bool:
        return any(progress.prefill_holds for progress in self)

    def may_be_in_step_of(self, worker_id: str) -> bool:
        return any(progress.may_be_in_step_of(worker_id) for progress in self)

    def is_isolated_on(self, worker_id: str) -> bool:
        return any(progress.is_isolated_on(worker_id) for progress in self)

    # --- what workers report ----------------------------------------------------------------------

    def on_routed(self, event: events.Routed) -> list[events.Action]:
        progress = self._jobs.get(event.job_id)
        if progress is None or not progress.waits_for_route:
            return []
        progress.route(event.decode_worker_id, event.prefill_worker_id)
        self.report.set_workers(event)
        return [*self.advance_to(RequestState.RESERVING), events.SendReserve(event.decode_worker_id, progress.job)]

    def on_reserved(self, event: events.Reserved, prefill_locally: PrefillLocally) -> list[events.Action]:
        progress = self._jobs.get(event.job_id)
        if progress is None or not progress.is_reserved_by(event.worker_id) or progress.prompt_started:
            return []
        job, prefill_worker_id = progress.job, progress.prefill_worker_id
        self.report.num_cached_tokens = min(event.num_cached_tokens, job.num_prompt_tokens)
        num_uncached = len(job.token_ids) - event.num_cached_tokens
        if prefill_worker_id is None or prefill_locally(job.job_id, event.worker_id, prefill_worker_id, num_uncached):
            progress.start_local_prefill()
            self.report.set_local_prefill()
            action: events.Action = events.SendRunPrompt(event.worker_id, job.job_id)
        else:
            progress.start_prefill()
            action = events.SendStartPrefill(
                prefill_worker_id, job, event.ticket, event.push_address, event.num_cached_tokens
            )
        return [*self.advance_to(RequestState.PREFILLING), action]

    def on_transfer_done(self, event: events.TransferDone) -> None:
        progress = self._jobs.get(event.job_id)
        if progress is not None and progress.is_prefilled_by(event.worker_id):
            progress.prefill_holds = False
            self.report.record_transfer(event)

    # --- what to do next --------------------------------------------------------------------------

    def routes(self, retries: RetryPolicy) -> list[events.Action]:
        """Isolated jobs run one after the other."""
        actions: list[events.Action] = []
        for progress in self:
            if progress.waits_for_route:
                excluded, avoided = retries.excluded_worker_ids, retries.avoided_pairs
                actions.append(events.Route(progress.job, excluded, avoided, uses_budget=retries.uses_budget))
            if progress.is_isolated:
                break
        return actions

    def set_paused(self, paused: bool) -> list[events.Action]:
        return [action for progress in self for action in progress.set_paused(paused)]

    def cancel(self) -> list[events.Action]:
        return [action for progress in self for action in (*progress.cancel_decode(), *progress.cancel_prefill())]

    def release_worker(self, worker_id: str) -> list[JobProgress]:
        """Returns the jobs that the lost worker held."""
        affected = [progress for progress in self if progress.release_hold(worker_id)]
        for progress in self:
            if worker_id == progress.prefill_worker_id and not progress.prompt_started:
                progress.prefill_worker_id = None
        return affected

    def advance_to(self, state: RequestState) -> list[events.Action]:
        """Passes through intermediate states where no edge is direct."""
        actions: list[events.Action] = []
        while _PROGRESS.index(self.state) < _PROGRESS.index(state):
            direct = check_edge(self.state, self.number, state, self.number)
            self.state = state if direct else _PROGRESS[_PROGRESS.index(self.state) + 1]
            actions.append(
                events.SetState(self.state, self.number, self.report.decode_worker_id, self.report.prefill_worker_id)
            )
        return actions
