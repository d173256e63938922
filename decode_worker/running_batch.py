"""The sequences that a decode worker computes: those in the batch, which hold blocks, and those preempted, which wait for some.

    join -> in the batch --make_room of an older one--> preempted --readmit--> in the batch -> leave

Both are ordered by age. The youngest is preempted first, and the oldest comes back first. Pure; the scheduler decides the rest.
"""

from bisect import insort
from collections.abc import Sequence

from decode_worker.work_state import Run
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager, BlockTable
from kvrelay.sequence import Sequence as TokenSequence


def _age(run: Run) -> tuple[int, int]:
    return run.age


class RunningBatch:
    """Owns the block tables of its runs.

    Args:
        blocks: the pool's bookkeeping.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._runs: list[Run] = []
        self._preempted: list[Run] = []
        self._run_by_sequence: dict[TokenSequence, Run] = {}
        self.num_preemptions = 0

    @property
    def runs(self) -> Sequence[Run]:
        """In the batch, oldest first."""
        return tuple(self._runs)

    @property
    def preempted(self) -> Sequence[Run]:
        """Oldest first."""
        return tuple(self._preempted)

    def run_of(self, sequence: TokenSequence) -> Run:
        """The run that computes a sequence."""
        return self._run_by_sequence[sequence]

    def join(self, run: Run, table: BlockTable, num_computed_tokens: int) -> None:
        """The run takes over the table and is computed from now on."""
        run.sequence.block_table = table
        run.sequence.num_computed_tokens = num_computed_tokens
        self._run_by_sequence[run.sequence] = run
        insort(self._runs, run, key=_age)

    def readmit(self, table: BlockTable) -> None:
        """The oldest preempted run comes back, to be computed again over the table, which was allocated for its tokens."""
        self.join(self._preempted.pop(0), table, table.num_cached_tokens)

    def detach(self, run: Run) -> BlockTable:
        """The run leaves the batch, and its table is the caller's."""
        table = run.table
        self._runs.remove(run)
        del self._run_by_sequence[run.sequence]
        run.sequence.block_table = None
        return table

    def leave(self, run: Run) -> None:
        """The run holds nothing any more."""
        if run.sequence.block_table is not None:
            self._blocks.release(self.detach(run))
        else:
            self._preempted.remove(run)
            del self._run_by_sequence[run.sequence]

    def make_room(self, run: Run) -> list[BlockCopy] | None:
        """Room for all tokens of a run, if need be taken from the youngest. None: the run itself was that, and is preempted."""
        while True:
            try:
                return self._blocks.grow(run.table, run.sequence.num_tokens)
            except OutOfBlocksError:
                youngest = self._runs[-1]
                self._preempt(youngest)
                if youngest is run:
                    return None

    def _preempt(self, run: Run) -> None:
        self._runs.remove(run)
        self._blocks.release(run.table)
        run.sequence.block_table = None
        run.sequence.num_computed_tokens = 0
        insort(self._preempted, run, key=_age)
        self.num_preemptions += 1
