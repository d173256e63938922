"""Where a work stands on a decode worker, and its sequences that are computed here. Changed by the scheduler alone."""

from dataclasses import dataclass, field
from enum import Enum, auto

from decode_worker.drafting import Drafter
from decode_worker.events import SchedulerEvent
from kvrelay import sequence as sequences
from kvrelay.kv_cache.block_manager import BlockTable
from kvrelay.work import Work


class Phase(Enum):
    WAITING = auto()
    RESERVED = auto()
    CLOSING = auto()
    ACTIVE = auto()


@dataclass(slots=True, eq=False)
class WorkState:
    work: Work
    age: int
    phase: Phase = Phase.WAITING
    table: BlockTable | None = None
    """The prompt's blocks while RESERVED or CLOSING."""
    runs: list["Run"] = field(default_factory=list)
    """Sequences that have not ended, while ACTIVE."""
    finished_early: set[int] = field(default_factory=set)
    """Sequences that the gateway ended before they ran."""
    runs_prompt: bool = False
    """The prompt is to be computed here as soon as no writer is left."""
    started: bool = False
    paused: bool = False
    """Nothing of it is computed for now; it keeps what it holds."""
    ending: SchedulerEvent | None = None
    """What to report when the writer has ended, while CLOSING."""

    @property
    def awaits_push(self) -> bool:
        """Its prompt's KV comes from a prefill worker, and then its next token is waited for."""
        return self.phase is Phase.RESERVED and not self.runs_prompt

    @property
    def num_slots(self) -> int:
        """Places in the batch that are set aside for the work."""
        if self.phase is Phase.WAITING:
            return 0
        if self.phase is Phase.ACTIVE:
            return sum(len(run.numbers) for run in self.runs)
        return self.work.num_sequences


@dataclass(slots=True, eq=False)
class Run:
    """A sequence that is computed here. Before the prompt of n sequences is there, it stands for all of them: `numbers`."""

    state: WorkState
    sequence: sequences.Sequence
    numbers: tuple[int, ...]
    drafter: Drafter | None = None
    """None before the first guess."""

    @property
    def age(self) -> tuple[int, int]:
        return self.state.age, self.sequence.number

    @property
    def num_new_tokens(self) -> int:
        """Sampled for this work, here or, the first, on the prefill worker."""
        return len(self.sequence.token_ids) - len(self.state.work.token_ids)

    @property
    def table(self) -> BlockTable:
        assert self.sequence.block_table is not None, "a run in the batch holds blocks"
        return self.sequence.block_table
