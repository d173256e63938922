"""What one engine step computes, as plain values: made by a scheduler, run by `kvrelay.step_runner`."""

from dataclasses import dataclass, field

from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.sequence import Sequence
from kvrelay.work import WorkId


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One sequence's part of a step.

    token_ids   |<- KV in blocks ->|<- num_tokens ->|<- drafts ->|
                0         num_computed_tokens   token_end

    Drafts are guesses for what the sequence says next, computed in the same pass: each is kept if it is what the sequence samples
    at its place. They are not among the sequence's tokens.
    """

    sequence: Sequence
    num_tokens: int
    """Tokens to compute, from `sequence.num_computed_tokens` on."""
    continued: tuple[int, ...] = ()
    """Numbers of the sequences that each sample a token from the last row: none in the middle of a prompt, several at the end of
    a prompt that n sequences share, else the sequence itself."""
    drafts: tuple[int, ...] = ()
    """Only for a sequence that has no other token to compute than its last, with room in its blocks for them too."""

    @property
    def token_begin(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def token_end(self) -> int:
        return self.sequence.num_computed_tokens + self.num_tokens

    @property
    def num_logits(self) -> int:
        """Rows that are sampled from: the one of the last token, and that of every draft."""
        return 1 + len(self.drafts) if self.continued else 0

    @property
    def work_id(self) -> WorkId:
        return self.sequence.work.work_id


@dataclass(frozen=True, slots=True)
class Step:
    """All entries of one step, and the block copies to be made before it."""

    entries: tuple[StepEntry, ...]
    copies: tuple[BlockCopy, ...] = field(default=())

    @property
    def work_ids(self) -> frozenset[WorkId]:
        return frozenset(entry.work_id for entry in self.entries)

    def apart(self) -> "list[Step]":
        """The same in steps of one entry each, with the copies that each needs: to find out which of them cannot be computed."""
        return [Step((entry,), self._copies_of(entry)) for entry in self.entries]

    def _copies_of(self, entry: StepEntry) -> tuple[BlockCopy, ...]:
        table = entry.sequence.block_table
        held = frozenset(table.blocks) if table is not None else frozenset()
        return tuple(copy for copy in self.copies if copy.target in held)
