"""Which guessed tokens a step computes besides what it must. Pure; the scheduler decides everything else.

    rows of the step   | what it must compute |<- drafts, shared among the sequences ->|
                       0                  num_rows                                 max_rows

Drafts take only what is left over: rows up to `max_rows`, and blocks that nobody waits for, which are given back after the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decode_worker.drafting import Drafter
from decode_worker.work_state import Run
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager
from kvrelay.step import StepEntry

FULL_STEP_COST = 4
"""A step of `max_rows` takes about so many times that of reading the weights; each row adds the same.

SmolLM2-135M on one Zen 3 core, ms of 1, 4, 8 and 16 rows: 34, 35, 47, 64 in float32, 11, 16, 25, 43 in int8.
"""


@dataclass(frozen=True, slots=True)
class SpeculationLimits:
    """How much may be guessed."""

    max_draft_tokens: int
    """Most drafts of one sequence in one step; 0 switches speculation off."""
    max_rows: int
    """A step with so many rows is bound by arithmetic: each draft would delay it."""
    max_sequence_tokens: int
    """No sequence has more tokens; the model may have no positions beyond."""


class Speculation:
    """Adds drafts to steps and learns from what became of them.

    Args:
        blocks: the pool's bookkeeping.
        limits: of drafts.
    """

    def __init__(self, blocks: BlockManager, limits: SpeculationLimits) -> None:
        self._blocks = blocks
        self._limits = limits
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0

    def add_drafts(
        self, entries: list[StepEntry], decoding: Sequence[tuple[int, Run]], *, may_take_blocks: bool
    ) -> list[BlockCopy]:
        """Replaces entries by such with drafts.

        Args:
            entries: all of the step.
            decoding: number within `entries`, and run, of those that compute one token and sample the next.
            may_take_blocks: whether free blocks are nobody's who waits.

        Returns:
            Copies to be made before the step.
        """
        copies: list[BlockCopy] = []
        num_rows = sum(entry.num_tokens for entry in entries)
        num_rows_left = self._limits.max_rows - num_rows
        # Of n rows a token costs (r + n) / n, r of them for reading the weights. A guess costs one, and is a token at times.
        least_share = num_rows / (num_rows + self._limits.max_rows / (FULL_STEP_COST - 1))
        for place, (number, run) in enumerate(decoding):
            if num_rows_left <= 0:
                break
            share = -(-num_rows_left // (len(decoding) - place))
            drafts = self._draft(run, share, least_share)
            if drafts and may_take_blocks:
                copies.extend(self._grow(run, len(drafts)))
            drafts = drafts[: len(run.table.blocks) * self._blocks.block_size - run.sequence.num_tokens]
            if drafts:
                entries[number] = replace(entries[number], drafts=drafts)
                num_rows_left -= len(drafts)
        return copies

    def note_verified(self, run: Run, entry: StepEntry, num_accepted: int) -> None:
        """The step was computed, and the accepted drafts are the sequence's tokens by now. Gives spare blocks back."""
        assert run.drafter is not None, "drafts come from here"
        self.num_drafted_tokens += len(entry.drafts)
        self.num_accepted_tokens += num_accepted
        run.drafter.note_verified(len(entry.drafts), num_accepted)
        self._blocks.shrink(run.table, run.sequence.num_computed_tokens)

    def _draft(self, run: Run, max_tokens: int, least_share: float) -> tuple[int, ...]:
        if run.drafter is None:
            run.drafter = Drafter(self._limits.max_draft_tokens)
        sequence, sampling = run.sequence, run.state.work.sampling
        assert sampling.max_tokens is not None, "checked"
        # Each draft comes with a further token: the last that is wanted needs no draft of its own.
        num_wanted = min(sampling.max_tokens - sequence.next_index, self._limits.max_sequence_tokens - sequence.num_tokens) - 1
        return run.drafter.draft(sequence.token_ids, min(max_tokens, num_wanted), least_share)

    def _grow(self, run: Run, num_drafts: int) -> list[BlockCopy]:
        num_tokens = run.sequence.num_tokens + num_drafts
        if self._blocks.blocks_for(num_tokens) <= len(run.table.blocks):
            return []
        try:
            return self._blocks.grow(run.table, num_tokens)
        except OutOfBlocksError:
            return []
