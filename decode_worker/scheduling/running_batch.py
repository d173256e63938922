"""A decode worker's running sequences: in the batch with blocks, or preempted without. Pure.

    add, start_all -> in the batch --grow of an older one--> preempted --readmit--> in the batch
                           |                                     |
                           '---------------remove----------------'

The youngest of the share with the most blocks is preempted first, the oldest of all never. A
share's oldest comes back first.
"""

from bisect import insort
from collections.abc import Sequence

from decode_worker.scheduling.running_sequence import DecodeJob, RunningSequence
from kvrelay.core.job import SequenceToken
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager, BlockTable


def _age(sequence: RunningSequence) -> tuple[int, int]:
    return sequence.age


class RunningBatch:
    """Owns the block tables."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._running: list[RunningSequence] = []
        self._preempted: list[RunningSequence] = []
        self.num_preemptions = 0

    @property
    def running(self) -> Sequence[RunningSequence]:
        """Oldest first."""
        return tuple(self._running)

    @property
    def preempted(self) -> Sequence[RunningSequence]:
        """Oldest first."""
        return tuple(self._preempted)

    def add(self, sequence: RunningSequence, table: BlockTable, num_computed_tokens: int) -> None:
        sequence.decode_job.sequences.append(sequence)
        self._join(sequence, table, num_computed_tokens)

    def start_all(self, job: DecodeJob, table: BlockTable, first_tokens: Sequence[SequenceToken]) -> None:
        """If all sequences have ended, the job has none afterwards."""
        going_on = [
            first for first in first_tokens if first.finish_reason is None and first.sequence not in job.finished_early
        ]
        tables = [table, *(self._blocks.fork(table) for _ in going_on[1:])]
        for first, own_table in zip(going_on, tables, strict=False):
            sequence = RunningSequence(job, (first.sequence,))
            sequence.append(first.token.token_id)
            self.add(sequence, own_table, len(job.spec.token_ids))
        if not going_on:
            self._blocks.release(table)

    def split(self, sequence: RunningSequence, first_tokens: Sequence[SequenceToken]) -> None:
        """Replaces a computed prompt by the sequences that share it."""
        job = sequence.decode_job
        job.sequences.remove(sequence)
        self.start_all(job, self._leave(sequence), first_tokens)

    def remove(self, sequence: RunningSequence) -> None:
        sequence.decode_job.sequences.remove(sequence)
        if sequence.block_table is None:
            self._preempted.remove(sequence)
        else:
            self._blocks.release(self._leave(sequence))

    @property
    def preempted_shares(self) -> frozenset[str]:
        return frozenset(sequence.job.share for sequence in self._preempted)

    def next_preempted(self, share: str) -> RunningSequence | None:
        """The share's oldest."""
        return next((sequence for sequence in self._preempted if sequence.job.share == share), None)

    def readmit(self, sequence: RunningSequence) -> bool:
        """False if there is no room."""
        try:
            table = self._blocks.allocate(sequence.token_ids, sequence.decode_job.spec.cache_salt)
        except OutOfBlocksError:
            return False
        self._preempted.remove(sequence)
        self._join(sequence, table, table.num_cached_tokens)
        return True

    def grow(self, sequence: RunningSequence) -> list[BlockCopy] | None:
        """Makes room by preempting others. None if it came to this sequence."""
        while True:
            try:
                return self._blocks.grow(sequence.table, sequence.num_tokens)
            except OutOfBlocksError:
                victim = self._victim()
                self.preempt(victim)
                if victim is sequence:
                    return None

    def _victim(self) -> RunningSequence:
        others = self._running[1:] or self._running
        held: dict[str, float] = {}
        for each in self._running:
            held[each.job.share] = held.get(each.job.share, 0.0) + len(each.table.blocks) / each.job.share_weight
        return max(others, key=lambda each: (held[each.job.share], each.age))

    def preempt(self, sequence: RunningSequence) -> None:
        self._blocks.release(self._leave(sequence))
        sequence.num_computed_tokens = 0
        insort(self._preempted, sequence, key=_age)
        self.num_preemptions += 1

    def _join(self, sequence: RunningSequence, table: BlockTable, num_computed_tokens: int) -> None:
        sequence.block_table = table
        sequence.num_computed_tokens = num_computed_tokens
        insort(self._running, sequence, key=_age)

    def _leave(self, sequence: RunningSequence) -> BlockTable:
        table = sequence.table
        self._running.remove(sequence)
        sequence.block_table = None
        return table
