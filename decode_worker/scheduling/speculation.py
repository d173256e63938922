"""Which guessed tokens a step computes. Pure.

    rows of the step   | what it must compute |<- drafts, shared among the sequences ->|
                       0                  num_rows                                 max_rows

Drafts take spare rows and, until the step's end, free blocks that no job waits for.
"""

from dataclasses import dataclass, replace

from decode_worker.scheduling.drafting import Drafter
from decode_worker.scheduling.running_sequence import RunningSequence, running_sequence
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager
from kvrelay.worker.step import StepEntry

FULL_STEP_COST = 4
"""Time of a step of `max_rows`, in times of reading the weights. SmolLM2-135M on a Zen 3 core, ms
of 1, 4, 8, 16 rows: float32 34, 35, 47, 64; int8 11, 16, 25, 43.
"""


@dataclass(frozen=True, slots=True)
class SpeculationLimits:
    max_draft_tokens: int
    """Per sequence and step."""
    max_rows: int
    """Beyond, a step is bound by arithmetic, and drafts would delay it."""
    max_sequence_tokens: int


class Speculation:
    def __init__(self, blocks: BlockManager, limits: SpeculationLimits) -> None:
        self._blocks = blocks
        self._limits = limits
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def add_drafts(self, entries: list[StepEntry], *, may_take_blocks: bool) -> list[BlockCopy]:
        """Adds drafts in place. Takes free blocks only if no job waits for them."""
        copies: list[BlockCopy] = []
        decoding = [place for place, entry in enumerate(entries) if entry.num_tokens == len(entry.continued) == 1]
        num_rows = sum(entry.num_tokens for entry in entries)
        num_rows_left = self._limits.max_rows - num_rows
        # A token costs (n + r) / n rows: r reads the weights. A draft costs one and may be wrong.
        least_share = num_rows / (num_rows + self._limits.max_rows / (FULL_STEP_COST - 1))
        for num_served, place in enumerate(decoding):
            if num_rows_left <= 0:
                break
            sequence = running_sequence(entries[place])
            share = -(-num_rows_left // (len(decoding) - num_served))
            drafts = self._draft(sequence, share, least_share)
            if drafts and may_take_blocks:
                copies.extend(self._grow(sequence, len(drafts)))
            drafts = drafts[: len(sequence.table.blocks) * self._blocks.block_size - sequence.num_tokens]
            if drafts:
                entries[place] = replace(entries[place], drafts=drafts)
                num_rows_left -= len(drafts)
        return copies

    def on_verified(self, entry: StepEntry, num_accepted: int) -> None:
        """Accepted drafts are tokens now. Frees spare blocks."""
        sequence = running_sequence(entry)
        assert sequence.drafter is not None, "drafts come from here"
        self.num_drafted_tokens += len(entry.drafts)
        self.num_accepted_tokens += num_accepted
        sequence.drafter.on_verified(len(entry.drafts), num_accepted)
        self._blocks.shrink(sequence.table, sequence.num_computed_tokens)

    def _draft(self, sequence: RunningSequence, max_tokens: int, least_share: float) -> tuple[int, ...]:
        if sequence.drafter is None:
            sequence.drafter = Drafter(self._limits.max_draft_tokens)
        if sequence.matcher is not None and sequence.matcher.is_slow:
            return ()  # each draft needs a mask
        sampling = sequence.decode_job.spec.sampling
        assert sampling.max_tokens is not None, "checked"
        # Each draft brings one more token with it, so the last wanted token needs no draft.
        num_wanted = (
            min(sampling.max_tokens - sequence.next_index, self._limits.max_sequence_tokens - sequence.num_tokens) - 1
        )
        return sequence.drafter.draft(sequence.token_ids, min(max_tokens, num_wanted), least_share)

    def _grow(self, sequence: RunningSequence, num_drafts: int) -> list[BlockCopy]:
        num_tokens = sequence.num_tokens + num_drafts
        if self._blocks.blocks_for(num_tokens) <= len(sequence.table.blocks):
            return []
        try:
            return self._blocks.grow(sequence.table, num_tokens)
        except OutOfBlocksError:
            return []
