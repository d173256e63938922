"""Which prompts get blocks and what each step computes on a prefill worker. Pure: a function of the events given to it.

    start -> WAITING -> COMPUTING -> SENDING --sender_ended--> ended
                            |           |
                            '-----------'--> CLOSING --sender_ended--> ended

A sender reads a work's blocks from the moment when these are allocated; whatever becomes of the work, its blocks are freed only
when the sender has ended. A prompt takes all its blocks or none, so that one that has begun always ends. Between two chunks of a
prompt another one may be computed: the queue says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.model_spec import ModelSpec
from kvrelay.sequence import Sequence as PromptSequence
from kvrelay.sequence import start_sequence
from kvrelay.step import Step, StepEntry
from kvrelay.work import FailureKind, SequenceToken, Work, WorkerLoad, WorkId
from kvrelay.work_rules import ends_with_first_token
from prefill_worker.events import Event, PromptComputed, PromptStarted, SendingStopped, WorkEnded, WorkFailed
from prefill_worker.prompt_queue import PromptQueue, ShortestFirstQueue


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """How much a step and the queue may hold."""

    prefill_chunk_tokens: int
    max_waiting_works: int


class _Phase(Enum):
    WAITING = auto()
    COMPUTING = auto()
    SENDING = auto()
    CLOSING = auto()


@dataclass(slots=True, eq=False)
class _WorkState:
    work: Work
    sequence: PromptSequence
    sends_kv: bool
    num_expected_cached_tokens: int
    """Leading tokens that had KV in the pool when the work came."""
    phase: _Phase = _Phase.WAITING
    ending: Event | None = None
    """What to report when the sender has ended, while CLOSING."""

    @property
    def num_cached_tokens(self) -> int:
        assert self.sequence.block_table is not None, "a started prompt holds blocks"
        return self.sequence.block_table.num_cached_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to compute; an expectation while the work waits for its blocks."""
        num_tokens = self.sequence.num_uncomputed_tokens
        return num_tokens - self.num_expected_cached_tokens if self.phase is _Phase.WAITING else num_tokens


class PrefillScheduler:
    """Owns the block manager. Used by one thread.

    Args:
        blocks: the pool's bookkeeping.
        model: the served model.
        limits: of a step and the queue.
        queue: the order of prompts; the shortest first, with ageing, unless given.
    """

    def __init__(
        self, blocks: BlockManager, model: ModelSpec, limits: PrefillLimits, queue: PromptQueue[_WorkState] | None = None
    ) -> None:
        self._blocks = blocks
        self._model = model
        self._limits = limits
        self._queue: PromptQueue[_WorkState] = ShortestFirstQueue() if queue is None else queue
        self._states: dict[WorkId, _WorkState] = {}
        self._events: list[Event] = []
        self._num_prefix_hit_tokens = 0
        self._num_computed_prompt_tokens = 0

    @property
    def num_works(self) -> int:
        """Works that hold or wait for anything."""
        return len(self._states)

    def work_ids(self) -> list[WorkId]:
        """All of them, oldest first."""
        return list(self._states)

    def take_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def load(self) -> WorkerLoad:
        """How busy the worker is."""
        queued = self._queue.in_order()
        num_waiting = sum(state.phase is _Phase.WAITING for state in queued)
        return WorkerLoad(
            num_running=len(queued) - num_waiting,
            num_waiting=num_waiting,
            num_queued_prompt_tokens=sum(state.num_remaining_tokens for state in queued),
            num_free_blocks=self._blocks.num_free_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            num_blocks=self._blocks.num_blocks,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            num_computed_prompt_tokens=self._num_computed_prompt_tokens,
        )

    # --- What happens to works

    def start(self, work: Work) -> None:
        """A new work, checked already."""
        if work.work_id in self._states:
            return
        if problem := self._why_refused(work):
            self._events.append(WorkFailed(work.work_id, FailureKind.OUT_OF_CAPACITY, problem))
            return
        sends_kv = not ends_with_first_token(work, self._model)
        num_cached_tokens = self._blocks.match_prefix(work.token_ids, work.cache_salt)
        state = _WorkState(work, start_sequence(work, work.work_id.first_sequence), sends_kv, num_cached_tokens)
        self._states[work.work_id] = state
        self._queue.push(state)

    def sender_ended(self, work_id: WorkId, problem: str | None) -> None:
        """The sender does not read the work's blocks any more.

        Args:
            work_id: whose sender.
            problem: why it ended without success; None when all KV was acknowledged.
        """
        state = self._states.get(work_id)
        if state is None:
            return
        if state.phase is _Phase.CLOSING and problem is not None:
            assert state.ending is not None
            self._end(state, state.ending)
        elif problem is not None:
            self._end(state, WorkFailed(work_id, FailureKind.TRANSFER, problem))
        else:
            # Perhaps told to stop too late: then it is done all the same.
            assert state.phase in (_Phase.SENDING, _Phase.CLOSING), "a push cannot be complete before its prompt is"
            self._end(state, WorkEnded(work_id))

    def cancel(self, work_id: WorkId) -> None:
        """The work is given up. Unknown works are ignored."""
        if state := self._states.get(work_id):
            self._give_up(state, WorkEnded(work_id))

    def fail(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        """The work ends without its result. Unknown works are ignored."""
        if state := self._states.get(work_id):
            self._give_up(state, WorkFailed(work_id, kind, message))

    # --- Steps

    def schedule(self) -> Step | None:
        """The next step: chunks of prompts in the queue's order, several short ones together. None when nothing can be computed.

        Where the next prompt to begin finds no room, none behind it begins, or a large one might wait for ever; those that have
        begun go on. Prompts that end with the step do not wait for much of one that does not: a step that has some of the former
        is filled up to a quarter only, which is about where a step of few tokens costs as much as one of more.
        """
        entries: list[StepEntry] = []
        full_tokens = self._limits.prefill_chunk_tokens
        num_left, has_room = full_tokens, True
        for state in self._queue.in_order():
            if entries and state.num_remaining_tokens > num_left:
                num_left -= full_tokens - full_tokens // 4
            if num_left <= 0:
                break
            if state.phase is _Phase.WAITING:
                has_room = has_room and self._begin(state)
            if state.phase is _Phase.COMPUTING:
                num_left -= self._schedule_chunk(state, num_left, entries)
        return Step(tuple(entries)) if entries else None

    def complete(self, step: Step, tokens: Sequence[SequenceToken]) -> None:
        """The step was computed.

        Args:
            step: from `schedule`.
            tokens: for each entry in order, one for each of its continued sequences.
        """
        remaining = iter(tokens)
        for entry in step.entries:
            state = self._states[entry.work_id]
            sequence = entry.sequence
            assert sequence.block_table is not None, "a started prompt holds blocks"
            sequence.num_computed_tokens = entry.token_end
            self._num_computed_prompt_tokens += entry.num_tokens
            self._blocks.commit(sequence.block_table, sequence.token_ids, sequence.num_computed_tokens)
            sampled = tuple(next(remaining) for _ in entry.continued)
            if sampled:
                self._finish_prompt(state, sampled)

    def fail_step(self, step: Step, kind: FailureKind, message: str) -> None:
        """The step could not be computed: ends all works in it."""
        for work_id in step.work_ids:
            self.fail(work_id, kind, message)

    # --- Below: parts of the above

    def _why_refused(self, work: Work) -> str | None:
        num_tokens = len(work.token_ids)
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_blocks:
            num_held = self._blocks.num_blocks * self._blocks.block_size
            return f"the prompt needs {num_tokens} tokens of KV; the worker's pool holds {num_held}"
        num_waiting = sum(state.phase is _Phase.WAITING for state in self._states.values())
        if num_waiting >= self._limits.max_waiting_works:
            return f"{num_waiting} works wait for their turn already"
        return None

    def _begin(self, state: _WorkState) -> bool:
        """Gives a prompt its blocks; False when there is no room."""
        try:
            table = self._blocks.allocate(state.work.token_ids, state.work.cache_salt)
        except OutOfBlocksError:
            return False
        self._num_prefix_hit_tokens += table.num_cached_tokens
        state.sequence.block_table = table
        state.sequence.num_computed_tokens = table.num_cached_tokens
        state.phase = _Phase.COMPUTING
        self._events.append(PromptStarted(state.work, tuple(table.blocks), table.num_cached_tokens, state.sends_kv))
        return True

    def _schedule_chunk(self, state: _WorkState, budget: int, entries: list[StepEntry]) -> int:
        num_tokens = min(budget, state.sequence.num_uncomputed_tokens)
        is_last = num_tokens == state.sequence.num_uncomputed_tokens
        entries.append(StepEntry(state.sequence, num_tokens, tuple(state.work.sequences) if is_last else ()))
        self._queue.note_scheduled(state, num_tokens)
        return num_tokens

    def _finish_prompt(self, state: _WorkState, tokens: tuple[SequenceToken, ...]) -> None:
        self._leave_queue(state)
        goes_on = any(token.finish_reason is None for token in tokens)
        assert state.sends_kv or not goes_on, "the finish rules end what is known to end"
        work_id = state.work.work_id
        self._events.append(PromptComputed(work_id, tokens, state.num_cached_tokens, sends_kv=goes_on))
        if not goes_on:
            self._give_up(state, WorkEnded(work_id))

    def _give_up(self, state: _WorkState, ending: Event) -> None:
        if state.phase is _Phase.CLOSING:
            return
        has_begun = state.phase is not _Phase.WAITING
        self._leave_queue(state)
        if has_begun and state.sends_kv:
            state.phase, state.ending = _Phase.CLOSING, ending
            self._events.append(SendingStopped(state.work.work_id))
        else:
            self._end(state, ending)

    def _leave_queue(self, state: _WorkState) -> None:
        if state.phase in (_Phase.WAITING, _Phase.COMPUTING):
            self._queue.remove(state)
            state.phase = _Phase.SENDING

    def _end(self, state: _WorkState, ending: Event) -> None:
        self._leave_queue(state)
        if state.sequence.block_table is not None:
            self._blocks.release(state.sequence.block_table)
            state.sequence.block_table = None
        del self._states[state.work.work_id]
        self._events.append(ending)
