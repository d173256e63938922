"""How far one job of the current attempt is, and which workers hold it. Pure.

A worker holds a job from the command that starts it until either side ends it.
"""

from gateway.lifecycle.events import Action, SendCancel, SendFinishSequence, SendSetPaused
from gateway.lifecycle.token_order import TokenOrder
from kvrelay.core.job import Job


class JobProgress:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.order = TokenOrder(job)
        self.decode_worker_id: str | None = None
        self.prefill_worker_id: str | None = None
        """None for a local prefill."""
        self.decode_holds = False
        self.prefill_holds = False
        self.prompt_started = False
        """StartPrefill or RunPrompt was sent."""
        self.decode_started = False
        self.awaiting_transfer_ack = False
        """One side of the transfer failed, but all KV may have arrived."""
        self.has_passed = False
        """Each sequence ended or has two tokens."""
        self._open_on_decode_worker = set(job.sequences)

    @property
    def waits_for_route(self) -> bool:
        return self.decode_worker_id is None

    @property
    def is_isolated(self) -> bool:
        """Whether the decode worker runs no other job."""
        return self.job.isolated and not self.has_passed

    @property
    def pair(self) -> tuple[str, str] | None:
        """(decode, prefill) worker."""
        if self.decode_worker_id is None or self.prefill_worker_id is None:
            return None
        return self.decode_worker_id, self.prefill_worker_id

    def route(self, decode_worker_id: str, prefill_worker_id: str | None) -> None:
        self.decode_worker_id, self.prefill_worker_id = decode_worker_id, prefill_worker_id
        self.decode_holds = True

    def start_local_prefill(self) -> None:
        self.prompt_started = True
        self.prefill_worker_id = None
        self.order.start_local_prefill()

    def start_prefill(self) -> None:
        self.prompt_started = True
        self.prefill_holds = True

    def is_prefilled_by(self, worker_id: str) -> bool:
        return self.prefill_holds and worker_id == self.prefill_worker_id

    def is_reserved_by(self, worker_id: str) -> bool:
        return self.decode_holds and worker_id == self.decode_worker_id

    def may_be_in_step_of(self, worker_id: str) -> bool:
        """Whether the worker may be computing the job now."""
        if self.is_prefilled_by(worker_id):
            return not self.order.first_tokens_known
        if not self.is_reserved_by(worker_id) or not self.prompt_started:
            return False
        return self.decode_started or self.prefill_worker_id is None or self.order.first_tokens_known

    def is_isolated_on(self, worker_id: str) -> bool:
        return self.is_isolated and self.may_be_in_step_of(worker_id)

    def peer_may_have_died(self, worker_id: str) -> bool:
        """Whether a broken transfer's peer may have died computing the job."""
        peer_id = self.prefill_worker_id if worker_id == self.decode_worker_id else self.decode_worker_id
        return peer_id is not None and not self.awaiting_transfer_ack and self.may_be_in_step_of(peer_id)

    @property
    def lacks_transfer_ack(self) -> bool:
        has_started = self.decode_started and self.decode_holds and self.order.first_tokens_known
        return self.awaiting_transfer_ack and not has_started

    def on_worker_ended(self, sequence: int) -> None:
        self._open_on_decode_worker.discard(sequence)
        if self.decode_started and not self._open_on_decode_worker:
            self.decode_holds = False

    def finish_sequence(self, sequence: int) -> list[Action]:
        if self.decode_worker_id is None or not self.decode_holds or sequence not in self._open_on_decode_worker:
            return []
        self.on_worker_ended(sequence)
        return [SendFinishSequence(self.decode_worker_id, self.job.job_id, sequence)]

    def set_paused(self, paused: bool) -> list[Action]:
        """An isolated job never pauses."""
        if self.is_isolated or not self.decode_started or not self.decode_holds or self.decode_worker_id is None:
            return []
        return [SendSetPaused(self.decode_worker_id, self.job.job_id, paused)]

    def cancel_decode(self) -> list[Action]:
        if not self.decode_holds or self.decode_worker_id is None:
            return []
        self.decode_holds = False
        return [SendCancel(self.decode_worker_id, self.job.job_id)]

    def cancel_prefill(self) -> list[Action]:
        if not self.prefill_holds or self.prefill_worker_id is None:
            return []
        self.prefill_holds = False
        return [SendCancel(self.prefill_worker_id, self.job.job_id)]

    def release_hold(self, worker_id: str) -> bool:
        """Returns whether the worker held the job."""
        if self.is_reserved_by(worker_id):
            self.decode_holds = False
            return True
        if self.is_prefilled_by(worker_id):
            self.prefill_holds = False
            return True
        return False

    def can_spare(self, worker_id: str) -> bool:
        """Whether the prefill worker has delivered tokens and KV."""
        return worker_id == self.prefill_worker_id and self.order.first_tokens_known and self.decode_started
