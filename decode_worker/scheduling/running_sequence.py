"""A decode worker's job and its sequences. Only its scheduler changes them."""

from dataclasses import dataclass, field
from enum import Enum, auto

from decode_worker.scheduling.drafting import Drafter
from decode_worker.scheduling.events import SchedulerEvent
from kvrelay.core.job import Job, JobId
from kvrelay.kv_cache.block_manager import BlockTable
from kvrelay.worker.sequence import PreparedJob, TokenSequence
from kvrelay.worker.step import StepEntry


class Phase(Enum):
    WAITING = auto()
    RESERVED = auto()
    """Has blocks, but no KV of the prompt."""
    RUNNING = auto()
    AWAITING_WRITER = auto()
    """Ended, but a push may still write into its blocks."""


@dataclass(slots=True, eq=False)
class DecodeJob:
    prepared: PreparedJob
    age: int
    phase: Phase = Phase.WAITING
    prompt_table: BlockTable | None = None
    """While RESERVED or AWAITING_WRITER."""
    sequences: list["RunningSequence"] = field(default_factory=list)
    finished_early: set[int] = field(default_factory=set)
    """Ended by the gateway before they ran."""
    computes_prompt: bool = False
    """Starts once no writer is left."""
    has_started: bool = False
    paused: bool = False
    """Keeps its blocks, but is not computed."""
    ending: SchedulerEvent | None = None
    """Reported after AWAITING_WRITER."""

    @property
    def spec(self) -> Job:
        return self.prepared.job

    @property
    def job_id(self) -> JobId:
        return self.spec.job_id

    @property
    def awaits_push(self) -> bool:
        return self.phase is Phase.RESERVED and not self.computes_prompt

    @property
    def num_slots(self) -> int:
        if self.phase is Phase.WAITING:
            return 0
        if self.phase is Phase.RUNNING:
            return sum(len(each.sequence_ids) for each in self.sequences if each.block_table is not None)
        return self.spec.num_sequences

    def num_held_blocks(self, block_size: int) -> int:
        """Counts the blocks of a prompt once, which its sequences share."""
        tables = [each.block_table for each in self.sequences if each.block_table is not None]
        if self.prompt_table is not None:
            tables.append(self.prompt_table)
        num_shared = max(len(tables) - 1, 0) * (len(self.spec.token_ids) // block_size)
        return sum(len(table.blocks) for table in tables) - num_shared


class RunningSequence(TokenSequence):
    def __init__(self, decode_job: DecodeJob, sequence_ids: tuple[int, ...]) -> None:
        super().__init__(decode_job.prepared, sequence_ids)
        self.decode_job = decode_job
        self.drafter: Drafter | None = None

    @property
    def age(self) -> tuple[int, int]:
        return self.decode_job.age, self.sequence_ids[0]

    @property
    def num_new_tokens(self) -> int:
        """Sampled for this job; the first perhaps by the prefill worker."""
        return len(self.token_ids) - len(self.decode_job.spec.token_ids)


def running_sequence(entry: StepEntry) -> RunningSequence:
    assert isinstance(entry.sequence, RunningSequence)
    return entry.sequence
