"""Decides on a prefill worker which prompts get blocks and what each step computes. Pure.

    start -> WAITING -> COMPUTING -> SENDING --sender_ended--> ended
                            |           |
                            '-----------'--cancelled--> AWAITING_SENDER --sender_ended--> ended

A sender reads a job's blocks from their allocation on, so they are freed only after it ended. A
prompt takes all its blocks or none, so that a started one always finishes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from kvrelay.core.fair_turns import KEPT_FOR_OTHERS, SeenShares
from kvrelay.core.fair_waiting import GIVES_WAY_MESSAGE, who_gives_way
from kvrelay.core.job import CacheChanges, FailureKind, Job, JobId, SequenceToken, WorkerLoad
from kvrelay.core.job_validation import ends_with_first_token
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.prompt_pace import PromptPace
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager, BlockTable
from kvrelay.worker.commands import JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob, TokenSequence
from kvrelay.worker.step import Step, StepEntry
from prefill_worker.scheduling.events import Event, PromptComputed, PromptStarted, SendingStopped
from prefill_worker.scheduling.prompt_queue import PromptQueue


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    prefill_chunk_tokens: int
    max_waiting_works: int


class _Phase(Enum):
    WAITING = auto()
    COMPUTING = auto()
    SENDING = auto()
    AWAITING_SENDER = auto()


@dataclass(slots=True, eq=False)
class PrefillJob:
    sequence: TokenSequence
    sends_kv: bool
    num_expected_cached_tokens: int
    """In the pool when the job came."""
    phase: _Phase = _Phase.WAITING
    ending: Event | None = None
    """Reported after AWAITING_SENDER."""

    @property
    def spec(self) -> Job:
        return self.sequence.job

    @property
    def job_id(self) -> JobId:
        return self.spec.job_id

    @property
    def share(self) -> str:
        return self.spec.share

    @property
    def share_weight(self) -> int:
        return self.spec.share_weight

    @property
    def num_remaining_tokens(self) -> int:
        """An estimate while the job waits for its blocks."""
        num_tokens = self.sequence.num_uncomputed_tokens
        return num_tokens - self.num_expected_cached_tokens if self.phase is _Phase.WAITING else num_tokens


@dataclass(slots=True)
class _WaitsForRoom:
    """Whose next prompts found no blocks in this step."""

    shares: set[str] = field(default_factory=set)
    all: bool = False


class PrefillScheduler:
    """Owns the block manager. Used by one thread."""

    def __init__(
        self, blocks: BlockManager, model: ModelSpec, limits: PrefillLimits, pace: PromptPace | None = None
    ) -> None:
        self.pace = pace or PromptPace()
        self._blocks = blocks
        self._model = model
        self._limits = limits
        self._queue: PromptQueue[PrefillJob] = PromptQueue()
        self._seen_shares = SeenShares()
        self._jobs: dict[JobId, PrefillJob] = {}
        self._events: list[Event] = []
        self._num_computed_prompt_tokens = 0

    def schedule(self) -> Step | None:
        """`complete` or `fail` must follow.

        If the next prompt has no room, later ones must not start, otherwise a large one starves.
        But others pass a share that holds blocks. A step that finishes a prompt takes others
        only up to a quarter of the budget, to give the first token early.
        """
        entries: list[StepEntry] = []
        full_tokens = self._chunk_tokens
        num_left, waits = full_tokens, _WaitsForRoom()
        for job in self._queue.in_order():
            if job.sequence.awaits_mask:
                continue
            if entries and job.num_remaining_tokens > num_left:
                num_left -= full_tokens - full_tokens // 4
            if num_left <= 0:
                break
            if job.phase is _Phase.WAITING:
                self._begin(job, waits)
            if job.phase is _Phase.COMPUTING:
                entry = self._next_chunk(job, num_left)
                num_left -= entry.num_tokens
                entries.append(entry)
        return Step(tuple(entries)) if entries else None

    def complete(self, step: Step, tokens: Sequence[SequenceToken]) -> None:
        """`tokens`: as from `accept_tokens`."""
        remaining = iter(tokens)
        for entry in step.entries:
            sequence = entry.sequence
            sequence.num_computed_tokens = entry.token_end
            self._num_computed_prompt_tokens += entry.num_tokens
            self._blocks.commit(sequence.table, sequence.token_ids, sequence.num_computed_tokens)
            first_tokens = tuple(next(remaining) for _ in entry.continued)
            if first_tokens:
                self._finish_prompt(self._jobs[entry.job_id], first_tokens)

    # --- What happens to jobs

    def start(self, prepared: PreparedJob) -> None:
        job = prepared.job
        if job.job_id in self._jobs:
            return
        if problem := self._why_refused(job):
            self._events.append(JobFailed(job.job_id, FailureKind.OUT_OF_CAPACITY, problem))
            return
        prefill_job = PrefillJob(
            TokenSequence(prepared, tuple(job.sequences)),
            sends_kv=not ends_with_first_token(job, self._model),
            num_expected_cached_tokens=self._blocks.match_prefix(job.token_ids, job.cache_salt),
        )
        self._jobs[job.job_id] = prefill_job
        self._seen_shares.add(job.share)
        self._queue.push(prefill_job)

    def sender_ended(self, job_id: JobId, problem: str | None) -> None:
        """`problem` is None after a complete push."""
        job = self._jobs.get(job_id)
        if job is None:
            return
        if job.phase is _Phase.AWAITING_SENDER and problem is not None:
            assert job.ending is not None
            self._end(job, job.ending)
        elif problem is not None:
            self._end(job, JobFailed(job_id, FailureKind.TRANSFER, problem))
        else:
            # A sender that was told to stop too late has succeeded all the same.
            assert job.phase in (_Phase.SENDING, _Phase.AWAITING_SENDER), (
                "a push cannot be complete before its prompt is"
            )
            self._end(job, JobEnded(job_id))

    def cancel(self, job_id: JobId) -> None:
        if job := self._jobs.get(job_id):
            self._cancel(job, JobEnded(job_id))

    def fail(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        if job := self._jobs.get(job_id):
            self._cancel(job, JobFailed(job_id, kind, message))

    # --- What is known from outside

    def job_ids(self) -> list[JobId]:
        """Oldest first."""
        return list(self._jobs)

    def drain_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def take_cache_changes(self) -> CacheChanges:
        return self._blocks.take_changes()

    def load(self) -> WorkerLoad:
        queued = self._queue.in_order()
        num_waiting = sum(job.phase is _Phase.WAITING for job in queued)
        return WorkerLoad(
            num_running=len(queued) - num_waiting,
            num_waiting=num_waiting,
            num_queued_prompt_tokens=sum(job.num_remaining_tokens for job in queued),
            num_free_blocks=self._blocks.num_free_blocks,
            num_cached_blocks=self._blocks.num_cached_blocks,
            num_used_blocks=self._blocks.num_used_blocks,
            num_blocks=self._blocks.num_blocks,
            num_prefix_hit_tokens=self._blocks.num_prefix_hit_tokens,
            num_computed_prompt_tokens=self._num_computed_prompt_tokens,
            prefill_tokens_per_s=self.pace.tokens_per_s(self._limits.prefill_chunk_tokens),
            prefill_step_ms=self.pace.step_ms,
            prefill_chunk_tokens=self._chunk_tokens,
        )

    # --- Below: parts of the above

    @property
    def _chunk_tokens(self) -> int:
        return self.pace.chunk_tokens(self._limits.prefill_chunk_tokens)

    def _why_refused(self, job: Job) -> str | None:
        num_tokens = len(job.token_ids)
        if self._blocks.blocks_for(num_tokens) > self._blocks.num_blocks:
            num_held = self._blocks.num_blocks * self._blocks.block_size
            return f"the prompt needs {num_tokens} tokens of KV; the worker's pool holds {num_held}"
        waiting = [other for other in self._jobs.values() if other.phase is _Phase.WAITING]
        if len(waiting) < self._limits.max_waiting_works:
            return None
        gives_way = who_gives_way(waiting, job)
        if gives_way is None:
            return f"{len(waiting)} jobs wait for their turn already"
        self._cancel(gives_way, JobFailed(gives_way.job_id, FailureKind.OUT_OF_CAPACITY, GIVES_WAY_MESSAGE))
        return None

    def _begin(self, job: PrefillJob, waits: "_WaitsForRoom") -> None:
        if waits.all or job.share in waits.shares:
            return
        try:
            table = self._allocate(job)
        except OutOfBlocksError:
            waits.all = not self._num_held_blocks(job.share)
            waits.shares.add(job.share)
            return
        job.sequence.block_table = table
        job.sequence.num_computed_tokens = table.num_cached_tokens
        job.phase = _Phase.COMPUTING
        self._events.append(PromptStarted(job.spec, tuple(table.blocks), table.num_cached_tokens, job.sends_kv))

    def _allocate(self, job: PrefillJob) -> BlockTable:
        """Leaves some of the pool to other shares, unless the job's own holds nothing."""
        if self._seen_shares.are_several and (num_held := self._num_held_blocks(job.share)):
            num_needed = self._blocks.blocks_for(len(job.spec.token_ids))
            if num_held + num_needed > self._blocks.num_blocks * (1 - KEPT_FOR_OTHERS):
                raise OutOfBlocksError("the rest is for other shares")
        return self._blocks.allocate(job.spec.token_ids, job.spec.cache_salt)

    def _num_held_blocks(self, share: str) -> int:
        tables = (job.sequence.block_table for job in self._jobs.values() if job.share == share)
        return sum(len(table.blocks) for table in tables if table is not None)

    def _next_chunk(self, job: PrefillJob, budget: int) -> StepEntry:
        sequence = job.sequence
        num_tokens = min(budget, sequence.num_uncomputed_tokens)
        is_last = num_tokens == sequence.num_uncomputed_tokens
        self._queue.count_scheduled(job, num_tokens)
        return StepEntry(sequence, num_tokens, sequence.sequence_ids if is_last else ())

    def _finish_prompt(self, job: PrefillJob, tokens: tuple[SequenceToken, ...]) -> None:
        self._leave_queue(job)
        goes_on = any(token.finish_reason is None for token in tokens)
        assert job.sends_kv or not goes_on, "the finish rules end what is known to end"
        self._events.append(PromptComputed(job.job_id, tokens, job.sequence.table.num_cached_tokens, sends_kv=goes_on))
        if not goes_on:
            self._cancel(job, JobEnded(job.job_id))

    def _cancel(self, job: PrefillJob, ending: Event) -> None:
        if job.phase is _Phase.AWAITING_SENDER:
            return
        has_blocks = job.phase is not _Phase.WAITING
        self._leave_queue(job)
        if has_blocks and job.sends_kv:
            job.phase, job.ending = _Phase.AWAITING_SENDER, ending
            self._events.append(SendingStopped(job.job_id))
        else:
            self._end(job, ending)

    def _leave_queue(self, job: PrefillJob) -> None:
        if job.phase in (_Phase.WAITING, _Phase.COMPUTING):
            self._queue.remove(job)
            job.phase = _Phase.SENDING

    def _end(self, job: PrefillJob, ending: Event) -> None:
        self._leave_queue(job)
        if job.sequence.block_table is not None:
            self._blocks.release(job.sequence.block_table)
            job.sequence.block_table = None
        del self._jobs[job.job_id]
        self._events.append(ending)
