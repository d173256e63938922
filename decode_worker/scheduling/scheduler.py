"""Decides on a decode worker which jobs get blocks and what each step computes. Pure.

    reserve -> WAITING -> RESERVED --push_ended or run_prompt--> RUNNING -> ended
                             |
                             '--cancelled while a push writes--> AWAITING_WRITER -> ended

While an isolated job is reserved, or has a sequence with fewer than two tokens, nothing else is
computed. There is at most one.

Some sequence always advances: the oldest is never preempted, no job of its share is admitted while
a preempted sequence waits, and a reservation takes all blocks of its prompt or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from decode_worker.scheduling.events import BlocksReserved, SchedulerEvent, SequencesStarted
from decode_worker.scheduling.fair_admission import FairAdmission
from decode_worker.scheduling.prompt_turns import PromptTurns
from decode_worker.scheduling.reservations import Reservations, WriteRevoker
from decode_worker.scheduling.running_batch import RunningBatch
from decode_worker.scheduling.running_sequence import DecodeJob, Phase, RunningSequence, running_sequence
from decode_worker.scheduling.speculation import Speculation, SpeculationLimits
from kvrelay.core.fair_waiting import GIVES_WAY_MESSAGE, who_gives_way
from kvrelay.core.job import CacheChanges, FailureKind, Job, JobId, SequenceToken, WorkerLoad
from kvrelay.core.prompt_pace import PromptPace
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager
from kvrelay.worker.commands import JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob, TokenSequence
from kvrelay.worker.step import Step, StepEntry
from kvrelay.worker.verification import group_by_entry


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    prefill_chunk_tokens: int
    max_running_sequences: int
    max_waiting_works: int
    shared_prefill_chunk_tokens: int | None = None
    """In a step with decoding or awaited sequences. None: as in any step."""


class DecodeScheduler:
    """Owns the block manager. Used by one thread."""

    def __init__(
        self,
        blocks: BlockManager,
        limits: DecodeLimits,
        writers: WriteRevoker,
        speculation: SpeculationLimits | None = None,
        pace: PromptPace | None = None,
    ) -> None:
        self.pace = pace or PromptPace()
        self._blocks = blocks
        self._limits = limits
        self._jobs: dict[JobId, DecodeJob] = {}
        self._reservations = Reservations(blocks, writers)
        self._batch = RunningBatch(blocks)
        self._admission = FairAdmission(blocks, self._batch, self._reservations, limits.max_running_sequences)
        self._prompt_turns = PromptTurns()
        self._speculation = Speculation(blocks, speculation) if speculation else None
        self._isolated_job: DecodeJob | None = None
        self._events: list[SchedulerEvent] = []
        self._next_age = 0
        self._num_computed_prompt_tokens = 0

    def schedule(self) -> Step | None:
        """`complete` or `fail` must follow."""
        while True:
            self._admit()
            held_before = len(self._jobs), self._batch.num_preemptions
            step = self._build_step()
            # A preempted or failed sequence gave blocks back, so another job may be admitted.
            if step is not None or held_before == (len(self._jobs), self._batch.num_preemptions):
                return step

    def complete(self, step: Step, tokens: Sequence[SequenceToken]) -> None:
        """`tokens`: as from `accept_tokens`."""
        for entry, sampled in zip(step.entries, group_by_entry(step.entries, tokens), strict=True):
            sequence = running_sequence(entry)
            num_accepted = len(sampled) - 1 if entry.drafts else 0
            for accepted in sampled[:num_accepted]:
                sequence.append(accepted.token.token_id)
            self._commit(sequence, entry, num_accepted)
            if sampled:
                self._continue(sequence, sampled[num_accepted:])
        isolated = self._isolated_job
        if isolated is not None and isolated.sequences and all(each.num_new_tokens >= 2 for each in isolated.sequences):
            self._end_isolation(isolated)

    # --- What happens to jobs

    def reserve(self, prepared: PreparedJob) -> None:
        """BlocksReserved or JobFailed answers, now or later."""
        job_id = prepared.job.job_id
        if job_id in self._jobs:
            return
        if problem := self._why_refused(prepared.job):
            self._events.append(JobFailed(job_id, FailureKind.OUT_OF_CAPACITY, problem))
            return
        self._next_age += 1
        self._jobs[job_id] = job = DecodeJob(prepared, age=self._next_age)
        self._admission.add(job)
        self._admit()

    def run_prompt(self, job_id: JobId) -> bool:
        """False unless the job waits for a push."""
        job = self._jobs.get(job_id)
        if job is None or not job.awaits_push:
            return False
        job.computes_prompt = True
        if self._reservations.revoke_writer(job):
            self._start_prompt(job)
        return True

    def push_ended(self, job_id: JobId, first_tokens: Sequence[SequenceToken] | None, problem: str = "") -> None:
        """`first_tokens` is None when the push failed."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if job.phase is Phase.AWAITING_WRITER:
            assert job.ending is not None
            self._end(job, job.ending)
        elif job.phase is Phase.RESERVED and job.computes_prompt:
            self._start_prompt(job)
        elif job.phase is Phase.RESERVED and first_tokens is None:
            self._end(job, JobFailed(job_id, FailureKind.TRANSFER, problem))
        elif job.phase is Phase.RESERVED and first_tokens is not None:
            table = self._reservations.claim(job)
            self._blocks.commit(table, job.spec.token_ids, len(job.spec.token_ids))
            self._report_start(job)
            self._batch.start_all(job, table, first_tokens)
            self._end_without_sequences(job)

    def finish_sequence(self, job_id: JobId, number: int) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        if job.phase is not Phase.RUNNING:
            job.finished_early.add(number)
            if job.finished_early.issuperset(job.spec.sequences):
                self._cancel(job, JobEnded(job_id))
            return
        for sequence in list(job.sequences):
            if sequence.sequence_ids == (number,):
                self._finish(sequence)
            else:
                sequence.sequence_ids = tuple(other for other in sequence.sequence_ids if other != number)

    def set_paused(self, job_id: JobId, paused: bool) -> None:
        if job := self._jobs.get(job_id):
            job.paused = paused

    def cancel(self, job_id: JobId) -> None:
        if job := self._jobs.get(job_id):
            self._cancel(job, JobEnded(job_id))

    def fail(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        if job := self._jobs.get(job_id):
            self._cancel(job, JobFailed(job_id, kind, message))

    def yield_reservations(self, idle: Sequence[JobId]) -> None:
        """`idle`: the oldest first."""
        message = "other jobs wait for the room that this session's reservations held without a prompt or a push"
        while True:
            jobs = [self._jobs[job_id] for job_id in idle if job_id in self._jobs]
            yielding = self._reservations.to_yield(jobs, self._jobs_without_room())
            if not yielding:
                return
            for job in yielding:
                self._cancel(job, JobFailed(job.job_id, FailureKind.OUT_OF_CAPACITY, message))
            self._admit()

    # --- What is known from outside

    def job_ids(self) -> list[JobId]:
        """Oldest first."""
        return list(self._jobs)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def drain_events(self) -> list[SchedulerEvent]:
        events, self._events = self._events, []
        return events

    def take_cache_changes(self) -> CacheChanges:
        return self._blocks.take_changes()

    def load(self) -> WorkerLoad:
        num_reserved = sum(job.phase in (Phase.RESERVED, Phase.AWAITING_WRITER) for job in self._jobs.values())
        running, preempted = self._batch.running, self._batch.preempted
        uncomputed = [sequence.num_uncomputed_tokens for sequence in (*running, *preempted)]
        return WorkerLoad(
            num_running=sum(len(sequence.sequence_ids) for sequence in running),
            num_waiting=self._reservations.num_waiting + num_reserved + len(preempted),
            num_queued_prompt_tokens=sum(num_tokens for num_tokens in uncomputed if num_tokens > 1),
            num_free_blocks=self._blocks.num_free_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            num_blocks=self._blocks.num_blocks,
            num_prefix_hit_tokens=self._blocks.num_prefix_hit_tokens,
            num_preemptions=self._batch.num_preemptions,
            num_computed_prompt_tokens=self._num_computed_prompt_tokens,
            num_drafted_tokens=self._speculation.num_drafted_tokens if self._speculation else 0,
            num_accepted_tokens=self._speculation.num_accepted_tokens if self._speculation else 0,
            prefill_tokens_per_s=self.pace.tokens_per_s(self._limits.prefill_chunk_tokens),
            prefill_step_ms=self.pace.step_ms,
            shared_prefill_tokens_per_s=self.pace.shared_tokens_per_s(self._most_shared_tokens),
            prefill_chunk_tokens=self._full_chunk_tokens,
            shared_prefill_chunk_tokens=self._shared_chunk_tokens,
        )

    # --- Admission

    def _why_refused(self, job: Job) -> str | None:
        num_tokens = len(job.token_ids) + 1
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_blocks:
            num_held = self._blocks.num_blocks * self._blocks.block_size
            return f"the sequence needs {num_tokens} tokens of KV; the worker's pool holds {num_held}"
        if job.num_sequences > self._limits.max_running_sequences:
            return f"the job has {job.num_sequences} sequences; a step holds {self._limits.max_running_sequences}"
        if self._reservations.num_waiting >= self._limits.max_waiting_works and not self._make_place_for(job):
            return f"{self._reservations.num_waiting} jobs wait for room already"
        return None

    def _make_place_for(self, newcomer: Job) -> bool:
        job = who_gives_way(self._reservations.waiting, newcomer)
        if job is not None:
            self._cancel(job, JobFailed(job.job_id, FailureKind.OUT_OF_CAPACITY, GIVES_WAY_MESSAGE))
        return job is not None

    def _admit(self) -> None:
        for sequence in list(self._batch.preempted):  # it would wait for blocks that are not there
            self._fail_if_outgrown(sequence)
        while (job := self._admission.admit_next(self._jobs.values(), self._isolated_job)) is not None:
            if job.spec.isolated:
                self._isolated_job = job
            table = job.prompt_table
            assert table is not None, "it was just reserved"
            self._events.append(BlocksReserved(job.spec, tuple(table.blocks), table.num_cached_tokens))

    def _jobs_without_room(self) -> list[DecodeJob]:
        """Not isolated ones that wait for another such one: blocks do not help them."""
        waits_for_turn = self._isolated_job is not None
        waiting = (job for job in self._reservations.waiting if not (job.spec.isolated and waits_for_turn))
        return [*(sequence.decode_job for sequence in self._batch.preempted), *waiting]

    def _start_prompt(self, job: DecodeJob) -> None:
        table = self._reservations.claim(job)
        sequence_ids = tuple(number for number in job.spec.sequences if number not in job.finished_early)
        self._batch.add(RunningSequence(job, sequence_ids), table, table.num_cached_tokens)

    def _report_start(self, job: DecodeJob) -> None:
        if not job.has_started:
            job.has_started = True
            self._events.append(SequencesStarted(job.job_id))

    # --- Building a step

    def _build_step(self) -> Step | None:
        entries: list[StepEntry] = []
        copies_of: dict[TokenSequence, list[BlockCopy]] = {}
        prompts = [each for each in self._batch.running if each.num_uncomputed_tokens > 1 and self._is_due(each)]
        prompt_tokens = self._prompt_turns.divide(prompts, self._prompt_budget())
        for sequence in self._batch.running:
            if not self._is_due(sequence):
                continue
            num_uncomputed = sequence.num_uncomputed_tokens
            num_tokens = 1 if num_uncomputed == 1 else prompt_tokens.get(sequence, 0)
            if num_tokens == 0:
                continue
            continued: tuple[int, ...] = ()
            if num_tokens == num_uncomputed:
                own_copies = self._grow(sequence)
                if own_copies is None:
                    continue
                copies_of[sequence] = own_copies
                continued = sequence.sequence_ids
            entries.append(StepEntry(sequence, num_tokens, continued))
        # One in the step may have been preempted for a later one, or have failed with its job.
        entries = [entry for entry in entries if entry.sequence.block_table is not None]
        copies = [copy for entry in entries for copy in copies_of.get(entry.sequence, ())]
        if self._speculation is not None:
            # Last, so that no sequence is preempted for a draft; waiting jobs go first.
            may_take_blocks = not (self._reservations.num_waiting or self._batch.preempted)
            copies += self._speculation.add_drafts(entries, may_take_blocks=may_take_blocks)
        return Step(tuple(entries), tuple(copies)) if entries else None

    def _prompt_budget(self) -> int:
        """Few if decoding or awaited sequences wait for the step's end."""
        full, shared = self._full_chunk_tokens, self._shared_chunk_tokens
        if shared >= full or self._isolated_job is not None:
            return full
        is_decoding = any(sequence.num_uncomputed_tokens == 1 for sequence in self._batch.running)
        return shared if is_decoding or any(job.awaits_push for job in self._jobs.values()) else full

    @property
    def _full_chunk_tokens(self) -> int:
        return self.pace.chunk_tokens(self._limits.prefill_chunk_tokens)

    @property
    def _shared_chunk_tokens(self) -> int:
        return self.pace.shared_chunk_tokens(self._most_shared_tokens)

    @property
    def _most_shared_tokens(self) -> int:
        return self._limits.shared_prefill_chunk_tokens or self._limits.prefill_chunk_tokens

    def _is_due(self, sequence: RunningSequence) -> bool:
        if sequence.block_table is None:
            return False  # an older sequence of this step preempted or ended it
        if self._isolated_job not in (None, sequence.decode_job):
            return False
        is_paused = sequence.decode_job.paused and sequence.decode_job is not self._isolated_job
        return not (is_paused or sequence.awaits_mask)

    def _grow(self, sequence: RunningSequence) -> list[BlockCopy] | None:
        """None: the sequence was preempted or failed."""
        if self._fail_if_outgrown(sequence):
            return None
        copies = self._batch.grow(sequence)
        isolated = self._isolated_job
        if isolated is not None and any(other.block_table is None for other in isolated.sequences):
            # A preempted one would wait for blocks of jobs that wait for its job.
            message = "running jobs hold the blocks that an isolated job needs"
            self.fail(isolated.job_id, FailureKind.OUT_OF_CAPACITY, message)
            return None
        return copies

    def _fail_if_outgrown(self, sequence: RunningSequence) -> bool:
        if self._blocks.blocks_for(sequence.num_tokens) <= self._blocks.num_blocks:
            return False
        message = f"a sequence of {sequence.num_tokens} tokens has outgrown the worker's pool"
        self.fail(sequence.decode_job.job_id, FailureKind.OUT_OF_CAPACITY, message)
        return True

    # --- After a step

    def _commit(self, sequence: RunningSequence, entry: StepEntry, num_accepted: int) -> None:
        """Also publishes the blocks that the tokens fill."""
        begin, num_prompt_tokens = sequence.num_computed_tokens, len(sequence.decode_job.spec.token_ids)
        if begin < num_prompt_tokens:
            self._num_computed_prompt_tokens += min(begin + entry.num_tokens, num_prompt_tokens) - begin
        # KV of wrong drafts lies behind `end`: never committed, and overwritten by the next step.
        sequence.num_computed_tokens = end = begin + entry.num_tokens + num_accepted
        if end // self._blocks.block_size > begin // self._blocks.block_size:
            self._blocks.commit(sequence.table, sequence.token_ids, end)
        if entry.drafts and self._speculation is not None:
            self._speculation.on_verified(entry, num_accepted)

    def _continue(self, sequence: RunningSequence, sampled: Sequence[SequenceToken]) -> None:
        self._report_start(sequence.decode_job)
        if len(sampled) > 1:
            self._batch.split(sequence, sampled)
            self._end_without_sequences(sequence.decode_job)
            return
        sequence.append(sampled[0].token.token_id)
        if sampled[0].finish_reason is not None:
            self._finish(sequence)

    # --- Ends

    def _finish(self, sequence: RunningSequence) -> None:
        self._batch.remove(sequence)
        self._end_without_sequences(sequence.decode_job)

    def _end_without_sequences(self, job: DecodeJob) -> None:
        if not job.sequences:
            self._end(job, JobEnded(job.job_id))

    def _cancel(self, job: DecodeJob, ending: SchedulerEvent) -> None:
        if job.phase is Phase.AWAITING_WRITER:
            return
        if not self._reservations.withdraw(job):
            job.phase, job.ending = Phase.AWAITING_WRITER, ending
            self._end_isolation(job)
            return
        for sequence in list(job.sequences):
            self._batch.remove(sequence)
        self._end(job, ending)

    def _end(self, job: DecodeJob, ending: SchedulerEvent) -> None:
        self._reservations.release(job)
        del self._jobs[job.job_id]
        self._end_isolation(job)
        self._events.append(ending)

    def _end_isolation(self, job: DecodeJob) -> None:
        if job is self._isolated_job:
            self._isolated_job = None
