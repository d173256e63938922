"""Which works get blocks and what each step computes on a decode worker. Pure: a function of the events given to it.

    reserve -> WAITING -> RESERVED --push_ended--> ACTIVE -> ended
                             |                       ^
                             '------run_prompt-------'      (or the push failed: ended)

A work that ends while a push writes into its blocks is CLOSING until that writer has ended: its blocks are freed only then.

A work that runs alone (`Work.runs_alone`) has the engine for itself from its reservation on, until each of its sequences has two
tokens: prompt and decode step are behind it then. The others keep their blocks and wait. One such work at a time is reserved.

An active work's sequences are in the batch, or preempted: without blocks, waiting to be computed again from their tokens. The
oldest sequence in the batch is never preempted for a younger one, nothing new is admitted while a preempted one waits, and a
reservation takes all blocks of its prompt or none; so somebody always advances.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from decode_worker.events import BlocksReserved, SchedulerEvent, SequencesStarted, WorkEnded, WorkFailed
from decode_worker.running_batch import RunningBatch
from decode_worker.speculation import Speculation, SpeculationLimits
from decode_worker.work_state import Phase, Run, WorkState
from kvrelay import sequence as sequences
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager, BlockTable
from kvrelay.step import Step, StepEntry
from kvrelay.step_output import tokens_of_entries
from kvrelay.work import FailureKind, SequenceToken, Work, WorkerLoad, WorkId


class WriterGate(Protocol):
    """Keeps writers of KV out of blocks that are to be freed."""

    def close(self, work_id: WorkId) -> bool:
        """Lets no further writer in. False when one is inside: `push_ended` will follow when it has left."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """How much a step and the queue may hold."""

    prefill_chunk_tokens: int
    max_running_sequences: int
    max_waiting_works: int
    shared_prefill_chunk_tokens: int | None = None
    """Most prompt tokens of a step in which sequences decode, or into which they may come by a push; None makes no difference
    between steps."""


class DecodeScheduler:
    """Owns the block manager. Used by one thread.

    Args:
        blocks: the pool's bookkeeping.
        limits: of a step and the queue.
        writers: keeps pushes out of blocks that are to be freed.
        speculation: how much may be guessed; None guesses nothing.
    """

    def __init__(
        self, blocks: BlockManager, limits: DecodeLimits, writers: WriterGate, speculation: SpeculationLimits | None = None
    ) -> None:
        self._blocks = blocks
        self._limits = limits
        self._writers = writers
        self._states: dict[WorkId, WorkState] = {}
        self._waiting: deque[WorkState] = deque()
        self._batch = RunningBatch(blocks)
        self._speculation = Speculation(blocks, speculation) if speculation else None
        self._events: list[SchedulerEvent] = []
        self._alone: WorkState | None = None
        """The work that has the engine for itself."""
        self._num_works = 0
        self._num_prefix_hit_tokens = 0
        self._num_computed_prompt_tokens = 0

    @property
    def num_works(self) -> int:
        """Works that hold or wait for anything."""
        return len(self._states)

    def work_ids(self) -> list[WorkId]:
        """All of them, oldest first."""
        return list(self._states)

    def take_events(self) -> list[SchedulerEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    def load(self) -> WorkerLoad:
        """How busy the worker is."""
        num_reserved = sum(1 for state in self._states.values() if state.phase in (Phase.RESERVED, Phase.CLOSING))
        uncomputed = [run.sequence.num_uncomputed_tokens for run in (*self._batch.runs, *self._batch.preempted)]
        return WorkerLoad(
            num_running=sum(len(run.numbers) for run in self._batch.runs),
            num_waiting=len(self._waiting) + num_reserved + len(self._batch.preempted),
            num_queued_prompt_tokens=sum(num_tokens for num_tokens in uncomputed if num_tokens > 1),
            num_free_blocks=self._blocks.num_free_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            num_blocks=self._blocks.num_blocks,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            num_preemptions=self._batch.num_preemptions,
            num_computed_prompt_tokens=self._num_computed_prompt_tokens,
            num_drafted_tokens=self._speculation.num_drafted_tokens if self._speculation else 0,
            num_accepted_tokens=self._speculation.num_accepted_tokens if self._speculation else 0,
        )

    # --- What happens to works

    def reserve(self, work: Work) -> None:
        """A new work; answered by BlocksReserved or WorkFailed, now or at a later step. The work is checked already."""
        if work.work_id in self._states:
            return
        if problem := self._why_refused(work):
            self._events.append(WorkFailed(work.work_id, FailureKind.OUT_OF_CAPACITY, problem))
            return
        self._num_works += 1
        state = WorkState(work, age=self._num_works)
        self._states[work.work_id] = state
        self._waiting.append(state)
        self._admit()

    def run_prompt(self, work_id: WorkId) -> bool:
        """The prompt is to be computed here; no push will come. False when the work is not reserved, or was told before."""
        state = self._states.get(work_id)
        if state is None or state.phase is not Phase.RESERVED or state.runs_prompt:
            return False
        state.runs_prompt = True
        if self._writers.close(work_id):
            self._start_prompt(state)
        return True

    def push_ended(self, work_id: WorkId, first_tokens: Sequence[SequenceToken] | None, problem: str = "") -> None:
        """The writer of a reservation has left.

        Args:
            work_id: whose reservation.
            first_tokens: of each sequence, in order, when all KV is there; None when the push failed.
            problem: why it failed.
        """
        state = self._states.get(work_id)
        if state is None:
            return
        if state.phase is Phase.CLOSING:
            self._end(state, state.ending)
        elif state.phase is Phase.RESERVED and state.runs_prompt:
            self._start_prompt(state)
        elif state.phase is Phase.RESERVED and first_tokens is None:
            self._end(state, WorkFailed(work_id, FailureKind.TRANSFER, problem))
        elif state.phase is Phase.RESERVED and first_tokens is not None:
            self._start_pushed(state, first_tokens)

    def finish_sequence(self, work_id: WorkId, number: int) -> None:
        """The gateway ends one sequence."""
        state = self._states.get(work_id)
        if state is None:
            return
        if state.phase is not Phase.ACTIVE:
            state.finished_early.add(number)
            if state.finished_early.issuperset(state.work.sequences):
                self._give_up(state, WorkEnded(work_id))
            return
        for run in list(state.runs):
            if run.numbers == (number,):
                self._finish(run)
            elif number in run.numbers:
                run.numbers = tuple(other for other in run.numbers if other != number)

    def set_paused(self, work_id: WorkId, paused: bool) -> None:
        """Computes nothing for a work until told otherwise. Unknown works are ignored."""
        if state := self._states.get(work_id):
            state.paused = paused

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
        """The next step: a token of every sequence in the batch, drafts, and parts of prompts. None when nothing can be computed.

        `complete` or `fail_step` must follow.
        """
        while True:
            self._admit()
            held_before = len(self._states), self._batch.num_preemptions
            step = self._build_step()
            # A run that found no room gave its blocks back: somebody else may be admitted with them.
            if step is not None or held_before == (len(self._states), self._batch.num_preemptions):
                return step

    def complete(self, step: Step, tokens: Sequence[SequenceToken]) -> None:
        """The step was computed.

        Args:
            step: from `schedule`.
            tokens: for each entry in order, one for each of its continued sequences; with drafts, as many more as were right.
        """
        for entry, sampled in zip(step.entries, tokens_of_entries(step.entries, tokens), strict=True):
            run = self._batch.run_of(entry.sequence)
            if entry.drafts:
                for accepted in sampled[:-1]:
                    run.sequence.append(accepted.token.token_id)
                self._note_computed(run, entry, num_accepted=len(sampled) - 1)
                self._continue(run, sampled[-1:])
            else:
                self._note_computed(run, entry)
                if sampled:
                    self._continue(run, sampled)
        self._end_solo()

    def fail_step(self, step: Step, kind: FailureKind, message: str) -> None:
        """The step could not be computed: ends all works in it."""
        for work_id in step.work_ids:
            self.fail(work_id, kind, message)

    # --- Admission

    def _why_refused(self, work: Work) -> str | None:
        num_tokens = len(work.token_ids) + 1
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_blocks:
            num_held = self._blocks.num_blocks * self._blocks.block_size
            return f"the sequence needs {num_tokens} tokens of KV; the worker's pool holds {num_held}"
        if work.num_sequences > self._limits.max_running_sequences:
            return f"the work has {work.num_sequences} sequences; a step holds {self._limits.max_running_sequences}"
        if len(self._waiting) >= self._limits.max_waiting_works:
            return f"{len(self._waiting)} works wait for room already"
        return None

    def _admit(self) -> None:
        """Lets in who waits, in order: preempted sequences, then new works."""
        while self._batch.preempted:
            run = self._batch.preempted[0]
            table = self._allocate(run.sequence.token_ids, run.state.work.cache_salt)
            if table is None:
                return
            self._batch.readmit(table)
        while self._waiting and self._has_slots_for(self._waiting[0].work):
            state = self._waiting[0]
            if state.work.runs_alone and self._alone is not None:
                return
            table = self._allocate(state.work.token_ids, state.work.cache_salt)
            if table is None:
                return
            self._waiting.popleft()
            state.phase, state.table = Phase.RESERVED, table
            if state.work.runs_alone:
                self._alone = state
            self._events.append(BlocksReserved(state.work, tuple(table.blocks), table.num_cached_tokens))

    def _has_slots_for(self, work: Work) -> bool:
        return self._num_slots_taken() + work.num_sequences <= self._limits.max_running_sequences

    def _num_slots_taken(self) -> int:
        return sum(state.num_slots for state in self._states.values())

    def _allocate(self, token_ids: Sequence[int], salt: str) -> BlockTable | None:
        try:
            table = self._blocks.allocate(token_ids, salt)
        except OutOfBlocksError:
            return None
        self._num_prefix_hit_tokens += table.num_cached_tokens
        return table

    # --- Building a step

    def _build_step(self) -> Step | None:
        entries: list[StepEntry] = []
        copies: list[BlockCopy] = []
        budget = self._prompt_budget()
        for run in self._batch.runs:
            if run.sequence.block_table is None or run.state.paused:
                continue  # preempted, or ended, by an older one of this step; or nobody reads what it says
            if self._alone is not None and run.state is not self._alone:
                continue
            num_uncomputed = run.sequence.num_uncomputed_tokens
            num_tokens = 1 if num_uncomputed == 1 else min(num_uncomputed, budget)
            if num_tokens == 0:
                continue
            if num_tokens < num_uncomputed:
                budget -= num_tokens
                entries.append(StepEntry(run.sequence, num_tokens))
                continue
            grown = self._grow(run)
            if grown is None:
                continue
            budget -= num_tokens if num_uncomputed > 1 else 0
            copies.extend(grown)
            entries.append(StepEntry(run.sequence, num_tokens, run.numbers))
        # A work that failed just now may have had an older sequence in the step already.
        remaining = [entry for entry in entries if entry.sequence.block_table is not None]
        if self._speculation is not None:
            copies.extend(self._add_drafts(self._speculation, remaining))
        return Step(tuple(remaining), tuple(copies)) if remaining else None

    def _prompt_budget(self) -> int:
        """Most prompt tokens of the next step: few when somebody's next token waits, or may soon wait, for the step's end."""
        full, shared = self._limits.prefill_chunk_tokens, self._limits.shared_prefill_chunk_tokens
        if shared is None or shared >= full or self._alone is not None:
            return full
        is_decoding = any(run.sequence.num_uncomputed_tokens == 1 for run in self._batch.runs)
        return shared if is_decoding or any(state.awaits_push for state in self._states.values()) else full

    def _add_drafts(self, speculation: Speculation, entries: list[StepEntry]) -> list[BlockCopy]:
        decoding = [
            (number, self._batch.run_of(entry.sequence))
            for number, entry in enumerate(entries)
            if entry.num_tokens == 1 and entry.continued == (entry.sequence.number,)
        ]
        # Last of all, so that no sequence is preempted for a draft; and a block that somebody waits for is none to spare.
        may_take_blocks = not (self._waiting or self._batch.preempted)
        return speculation.add_drafts(entries, decoding, may_take_blocks=may_take_blocks)

    def _grow(self, run: Run) -> list[BlockCopy] | None:
        """Room for all tokens of the run, if need be taken from younger ones. None: it was preempted or failed itself."""
        if self._blocks.blocks_for(run.sequence.num_tokens) > self._blocks.num_blocks:
            message = f"a sequence of {run.sequence.num_tokens} tokens has outgrown the worker's pool"
            self.fail(run.state.work.work_id, FailureKind.OUT_OF_CAPACITY, message)
            return None
        copies = self._batch.make_room(run)
        if self._alone is not None and any(other.sequence.block_table is None for other in self._alone.runs):
            # It was preempted, and would wait for blocks of others, who wait for it.
            message = "others hold the blocks that a work needs which runs alone"
            self.fail(self._alone.work.work_id, FailureKind.OUT_OF_CAPACITY, message)
            return None
        return copies

    # --- What a step brings

    def _note_computed(self, run: Run, entry: StepEntry, num_accepted: int = 0) -> None:
        sequence = entry.sequence
        begin, num_prompt_tokens = sequence.num_computed_tokens, len(run.state.work.token_ids)
        if begin < num_prompt_tokens:
            self._num_computed_prompt_tokens += min(begin + entry.num_tokens, num_prompt_tokens) - begin
        # Drafts that were wrong have KV behind this, which the next step overwrites: it is never committed.
        sequence.num_computed_tokens = end = begin + entry.num_tokens + num_accepted
        if end // self._blocks.block_size > begin // self._blocks.block_size:
            self._blocks.commit(run.table, sequence.token_ids, end)
        if entry.drafts and self._speculation is not None:
            self._speculation.note_verified(run, entry, num_accepted)

    def _continue(self, run: Run, sampled: Sequence[SequenceToken]) -> None:
        state = run.state
        if not state.started:
            state.started = True
            self._events.append(SequencesStarted(state.work.work_id))
        if len(sampled) > 1 or run.sequence.number != sampled[0].sequence:
            self._split(run, sampled)
            return
        run.sequence.append(sampled[0].token.token_id)
        if sampled[0].finish_reason is not None:
            self._finish(run)

    def _split(self, run: Run, sampled: Sequence[SequenceToken]) -> None:
        """The shared prompt is there: each sequence goes on by itself."""
        run.state.runs.remove(run)
        self._start_sequences(run.state, self._batch.detach(run), sampled)

    def _start_pushed(self, state: WorkState, first_tokens: Sequence[SequenceToken]) -> None:
        table, state.table = state.table, None
        assert table is not None, "a reservation has blocks"
        self._blocks.commit(table, state.work.token_ids, len(state.work.token_ids))
        state.phase, state.started = Phase.ACTIVE, True
        self._events.append(SequencesStarted(state.work.work_id))
        self._start_sequences(state, table, first_tokens)

    def _start_prompt(self, state: WorkState) -> None:
        table, state.table = state.table, None
        assert table is not None, "a reservation has blocks"
        numbers = tuple(number for number in state.work.sequences if number not in state.finished_early)
        run = Run(state, sequences.start_sequence(state.work, numbers[0]), numbers)
        state.phase = Phase.ACTIVE
        state.runs.append(run)
        self._batch.join(run, table, table.num_cached_tokens)

    def _start_sequences(self, state: WorkState, table: BlockTable, first_tokens: Sequence[SequenceToken]) -> None:
        """All sequences of a work behind their first tokens, over the prompt's blocks."""
        live = [first for first in first_tokens if first.finish_reason is None and first.sequence not in state.finished_early]
        tables = [table, *(self._blocks.fork(table) for _ in live[1:])] if live else []
        for first, own_table in zip(live, tables, strict=True):
            run = Run(state, sequences.start_sequence(state.work, first.sequence), (first.sequence,))
            run.sequence.append(first.token.token_id)
            state.runs.append(run)
            self._batch.join(run, own_table, len(state.work.token_ids))
        if not live:
            self._blocks.release(table)
            self._end(state, WorkEnded(state.work.work_id))

    # --- Ends

    def _finish(self, run: Run) -> None:
        self._batch.leave(run)
        run.state.runs.remove(run)
        if not run.state.runs:
            self._end(run.state, WorkEnded(run.state.work.work_id))

    def _end_solo(self) -> None:
        """The work that runs alone needs to do so no more, once it is over its prompt and a decode step."""
        state = self._alone
        if state is not None and state.runs and all(run.num_new_tokens >= 2 for run in state.runs):
            self._alone = None

    def _give_up(self, state: WorkState, ending: SchedulerEvent) -> None:
        if state.phase is Phase.CLOSING:
            return
        if state is self._alone:
            self._alone = None
        if state.phase is Phase.WAITING:
            self._waiting.remove(state)
        if state.phase is Phase.RESERVED and not self._writers.close(state.work.work_id):
            state.phase, state.ending = Phase.CLOSING, ending
            return
        for run in state.runs:
            self._batch.leave(run)
        state.runs.clear()
        self._end(state, ending)

    def _end(self, state: WorkState, ending: SchedulerEvent | None) -> None:
        if state.table is not None:
            self._blocks.release(state.table)
            state.table = None
        del self._states[state.work.work_id]
        if state is self._alone:
            self._alone = None
        if ending is not None:
            self._events.append(ending)
