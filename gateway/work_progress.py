"""How far one work of the current attempt is, and which worker holds something of it. Pure."""

from gateway.lifecycle_messages import Action, SendCancel, SendFinishSequence, SendSetPaused
from gateway.token_order import TokenOrder
from kvrelay.work import SequenceToken, Work


class WorkProgress:
    """One work from routing to end. A worker *holds* it from the command that gave it until it reports or is told an end."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.order = TokenOrder(work)
        self.decode_worker_id: str | None = None
        """None until routed."""
        self.prefill_worker_id: str | None = None
        """None when the decode worker computes the prompt, or before it is routed."""
        self.decode_holds = False
        self.prefill_holds = False
        self.prompt_started = False
        """StartPrefill or RunPrompt was sent."""
        self.decode_started = False
        self.settling = False
        """The prefill worker is gone after its first tokens; only the decode worker can tell whether all KV arrived."""
        self.has_passed = False
        """Each of its sequences has got two tokens in this attempt, or has ended: prompt and decode step did no harm."""
        self._open_on_decode_worker = set(work.sequences)

    @property
    def waits_for_route(self) -> bool:
        return self.decode_worker_id is None

    @property
    def is_on_trial(self) -> bool:
        """Its decode worker computes nothing else, from its reservation on."""
        return self.work.runs_alone and not self.has_passed

    @property
    def pair(self) -> tuple[str, str] | None:
        """(decode, prefill) worker, when there are both."""
        if self.decode_worker_id is None or self.prefill_worker_id is None:
            return None
        return self.decode_worker_id, self.prefill_worker_id

    def route(self, decode_worker_id: str, prefill_worker_id: str | None) -> None:
        """The decode worker is about to be told to reserve."""
        self.decode_worker_id, self.prefill_worker_id = decode_worker_id, prefill_worker_id
        self.decode_holds = True

    def begin_local_prompt(self) -> None:
        """The decode worker is about to be told to compute the prompt."""
        self.prompt_started = True
        self.prefill_worker_id = None
        self.order.begin_local_prompt()

    def begin_prefill(self) -> None:
        """The prefill worker is about to be told to start."""
        self.prompt_started = True
        self.prefill_holds = True

    def is_prefilled_by(self, worker_id: str) -> bool:
        """Whether that worker may report on the prompt."""
        return self.prefill_holds and worker_id == self.prefill_worker_id

    def is_reserved_by(self, worker_id: str) -> bool:
        """Whether that worker may report on the reservation."""
        return self.decode_holds and worker_id == self.decode_worker_id

    def may_be_in_step_of(self, worker_id: str) -> bool:
        """Whether that worker may be computing something of the work just now, so that it may die of it."""
        if self.is_prefilled_by(worker_id):
            return not self.order.first_tokens_known
        if not self.is_reserved_by(worker_id) or not self.prompt_started:
            return False
        return self.decode_started or self.prefill_worker_id is None or self.order.first_tokens_known

    def runs_alone_on(self, worker_id: str) -> bool:
        """Whether that worker computes the work just now, and nothing else."""
        return self.is_on_trial and self.may_be_in_step_of(worker_id)

    def peer_may_have_died(self, worker_id: str) -> bool:
        """Whether a transfer that this worker says broke off may have done so because its peer died in a step with the work."""
        peer_id = self.prefill_worker_id if worker_id == self.decode_worker_id else self.decode_worker_id
        return peer_id is not None and not self.settling and self.may_be_in_step_of(peer_id)

    @property
    def is_settled(self) -> bool:
        """Whether the decode worker goes on with it and no token is missing, whatever was said of the transfer."""
        return self.decode_started and self.decode_holds and self.order.first_tokens_known

    def note_worker_ended(self, token: SequenceToken) -> None:
        """The token's finish reason ends the sequence on the decode worker too: it made the token, or gets it with the push."""
        if token.finish_reason is not None:
            self._close_sequence(token.sequence)

    def finish_sequence(self, sequence: int) -> list[Action]:
        """Tells the decode worker that the gateway ended a sequence, unless the worker ended it itself."""
        if self.decode_worker_id is None or not self.decode_holds or sequence not in self._open_on_decode_worker:
            return []
        self._close_sequence(sequence)
        return [SendFinishSequence(self.decode_worker_id, self.work.work_id, sequence)]

    def set_paused(self, paused: bool) -> list[Action]:
        """Tells the decode worker to rest or to go on, if the work runs there. On trial nothing rests: others wait for it."""
        if self.is_on_trial or not self.decode_started or not self.decode_holds or self.decode_worker_id is None:
            return []
        return [SendSetPaused(self.decode_worker_id, self.work.work_id, paused)]

    def _close_sequence(self, sequence: int) -> None:
        self._open_on_decode_worker.discard(sequence)
        if self.decode_started and not self._open_on_decode_worker:
            self.decode_holds = False

    def cancel_decode(self) -> list[Action]:
        """Tells the decode worker to free what it holds, if anything."""
        if not self.decode_holds or self.decode_worker_id is None:
            return []
        self.decode_holds = False
        return [SendCancel(self.decode_worker_id, self.work.work_id)]

    def cancel_prefill(self) -> list[Action]:
        """Tells the prefill worker to free what it holds, if anything."""
        if not self.prefill_holds or self.prefill_worker_id is None:
            return []
        self.prefill_holds = False
        return [SendCancel(self.prefill_worker_id, self.work.work_id)]

    def release_hold(self, worker_id: str) -> bool:
        """Notes that the worker has nothing of the work any more; False when it had nothing before."""
        if self.is_reserved_by(worker_id):
            self.decode_holds = False
            return True
        if self.is_prefilled_by(worker_id):
            self.prefill_holds = False
            return True
        return False

    def can_spare(self, worker_id: str) -> bool:
        """Whether the work goes on without that worker: a prefill worker whose tokens and KV are all delivered."""
        return worker_id == self.prefill_worker_id and self.order.first_tokens_known and self.decode_started
