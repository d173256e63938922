"""What each share holds of a decode worker. Pure."""

from collections.abc import Iterable

from decode_worker.scheduling.running_sequence import DecodeJob
from kvrelay.core.fair_turns import KEPT_FOR_OTHERS
from kvrelay.kv_cache.block_manager import BlockManager


class ShareHoldings:
    """Measures a share by its part of the blocks or of the slots, the larger one, over its weight.

    After Ghodsi et al., "Dominant Resource Fairness", 2011.
    """

    def __init__(self, jobs: Iterable[DecodeJob], blocks: BlockManager, max_sequences: int) -> None:
        self._num_blocks = blocks.num_blocks
        self._max_sequences = max_sequences
        self._slots: dict[str, int] = {}
        self._blocks: dict[str, int] = {}
        self._weights: dict[str, int] = {}
        self._waiting: dict[str, float] = {}
        """Parts of the worker that wait for a prompt's KV, and cannot be preempted."""
        for job in jobs:
            share = job.spec.share
            self._slots[share] = self._slots.get(share, 0) + job.num_slots
            self._blocks[share] = self._blocks.get(share, 0) + job.num_held_blocks(blocks.block_size)
            self._weights[share] = max(self._weights.get(share, 1), job.spec.share_weight)
            if job.prompt_table is not None:
                part = self._part(job.num_slots, len(job.prompt_table.blocks))
                self._waiting[share] = self._waiting.get(share, 0.0) + part

    @property
    def num_slots(self) -> int:
        return sum(self._slots.values())

    def of(self, share: str) -> float:
        return self.with_more(share, 0, 0)

    def with_more(self, share: str, num_slots: int, num_blocks: int) -> float:
        """Returns what the share would hold; counts may be negative."""
        slots, blocks = self._slots.get(share, 0) + num_slots, self._blocks.get(share, 0) + num_blocks
        return self._part(slots, blocks) / self._weights.get(share, 1)

    def leaves_room(self, share: str, num_slots: int, num_blocks: int) -> bool:
        """Whether one more reservation leaves others something that is free or can be preempted."""
        waiting = self._waiting.get(share, 0.0)
        return not waiting or waiting + self._part(num_slots, num_blocks) <= 1 - KEPT_FOR_OTHERS

    def most_of_others(self, share: str) -> float:
        return max((self.of(other) for other in self._slots if other != share), default=0.0)

    def _part(self, num_slots: int, num_blocks: int) -> float:
        return max(num_slots / self._max_sequences, num_blocks / self._num_blocks)

    def take(self, share: str, num_slots: int, num_blocks: int) -> None:
        self._slots[share] -= num_slots
        self._blocks[share] -= num_blocks
