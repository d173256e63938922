"""One attempt of a request: its works, the state that it has reached, and what its workers reported. Pure.

An attempt goes forward only. It ends with its last token, or the next one begins with other works.
"""

from collections.abc import Iterable, Iterator

from gateway.lifecycle_messages import Action, AttemptReport, Route, SetState
from gateway.retry_policy import RetryPolicy
from gateway.work_progress import WorkProgress
from kvrelay.request_state import RequestState, check_edge
from kvrelay.work import Work, WorkId

_PROGRESS = (
    RequestState.QUEUED,
    RequestState.RESERVING,
    RequestState.PREFILLING,
    RequestState.TRANSFERRING,
    RequestState.DECODING,
)


class Attempt:
    """What the lifecycle knows of the attempt that runs.

    Args:
        number: from 1.
        works: one, or one for each sequence that has not ended.
    """

    def __init__(self, number: int, works: Iterable[Work]) -> None:
        self.number = number
        self.state = RequestState.QUEUED
        self.report = AttemptReport()
        self._works = {work.work_id: WorkProgress(work) for work in works}

    def __iter__(self) -> Iterator[WorkProgress]:
        return iter(self._works.values())

    def find(self, work_id: WorkId) -> WorkProgress | None:
        """None for a work of another attempt, or of none."""
        return self._works.get(work_id)

    def find_decoding(self, work_id: WorkId, worker_id: str) -> WorkProgress | None:
        """The work if that worker may report its decode tokens."""
        progress = self._works.get(work_id)
        if progress is None or not progress.is_reserved_by(worker_id) or not progress.prompt_started:
            return None
        return progress

    def work_of(self, sequence: int) -> WorkProgress | None:
        """The work that continues a sequence; None for one that had ended before."""
        return next((progress for progress in self if sequence in progress.work.sequences), None)

    @property
    def has_passed(self) -> bool:
        """Whether all its works have."""
        return all(progress.has_passed for progress in self)

    @property
    def awaits_report(self) -> bool:
        """Whether a prefill worker still has to say how the transfer went."""
        return any(progress.prefill_holds for progress in self)

    def may_be_in_step_of(self, worker_id: str) -> bool:
        """Whether that worker may be computing something of it just now."""
        return any(progress.may_be_in_step_of(worker_id) for progress in self)

    def runs_alone_on(self, worker_id: str) -> bool:
        """Whether that worker computes something of it just now, and nothing else."""
        return any(progress.runs_alone_on(worker_id) for progress in self)

    # --- what is to be done -----------------------------------------------------------------------------------------------------

    def routes(self, retries: RetryPolicy) -> list[Action]:
        """Asks for workers for works that have none; where they run alone, one after the other."""
        actions: list[Action] = []
        for progress in self:
            if progress.waits_for_route:
                excluded, avoided = retries.excluded_worker_ids, retries.avoided_pairs
                actions.append(Route(progress.work, excluded, avoided, is_paid_retry=retries.is_due_to_pay))
            if progress.is_on_trial:
                break
        return actions

    def set_paused(self, paused: bool) -> list[Action]:
        """Tells the decode workers to rest or to go on."""
        return [action for progress in self for action in progress.set_paused(paused)]

    def cancel(self) -> list[Action]:
        """Tells all workers to free what they hold."""
        return [action for progress in self for action in (*progress.cancel_decode(), *progress.cancel_prefill())]

    def advance_to(self, state: RequestState) -> list[Action]:
        """Moves forward to the state, over the states between where no edge leads there; an attempt never goes back."""
        actions: list[Action] = []
        while _PROGRESS.index(self.state) < _PROGRESS.index(state):
            direct = check_edge(self.state, self.number, state, self.number)
            self.state = state if direct else _PROGRESS[_PROGRESS.index(self.state) + 1]
            actions.append(SetState(self.state, self.number, self.report.decode_worker_id, self.report.prefill_worker_id))
        return actions
