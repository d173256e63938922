"""One engine step: schedulers make it, `StepRunner` runs it."""

from dataclasses import dataclass

from kvrelay.core.job import JobId
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.worker.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One sequence's part of a step.

    token_ids   |<- KV in blocks ->|<- num_tokens ->|<- drafts ->|
                0         num_computed_tokens   token_end

    Drafts are guesses for the next tokens, computed in the same pass.
    """

    sequence: TokenSequence
    num_tokens: int
    continued: tuple[int, ...] = ()
    """Sequences that sample from the last row: none inside a prompt, several after a shared one."""
    drafts: tuple[int, ...] = ()
    """Only with one token to compute, and room in the blocks."""

    @property
    def token_begin(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def token_end(self) -> int:
        return self.sequence.num_computed_tokens + self.num_tokens

    @property
    def is_of_prompt(self) -> bool:
        return self.num_tokens > 1 or self.token_begin < len(self.sequence.job.token_ids)

    @property
    def num_logits(self) -> int:
        return 1 + len(self.drafts) if self.continued else 0

    @property
    def job_id(self) -> JobId:
        return self.sequence.job.job_id


@dataclass(frozen=True, slots=True)
class Step:
    entries: tuple[StepEntry, ...]
    copies: tuple[BlockCopy, ...] = ()

    @property
    def job_ids(self) -> frozenset[JobId]:
        return frozenset(entry.job_id for entry in self.entries)

    def split(self) -> "list[Step]":
        """One step per entry, to find the entry that cannot be computed."""
        return [Step((entry,), self._copies_of(entry)) for entry in self.entries]

    def _copies_of(self, entry: StepEntry) -> tuple[BlockCopy, ...]:
        table = entry.sequence.block_table
        held = frozenset(table.blocks) if table is not None else frozenset()
        return tuple(copy for copy in self.copies if copy.target in held)
