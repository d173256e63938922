"""Jobs before they run: they wait for blocks, or their blocks wait for the prompt's KV. Pure.

add -> WAITING --reserve--> RESERVED --claim--> the batch
          |                    |
          '------withdraw------'      refused while a writer is inside
"""

from collections import Counter, deque
from collections.abc import Iterable, Set
from typing import Protocol

from decode_worker.scheduling.running_sequence import DecodeJob, Phase
from kvrelay.core.job import JobId
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager, BlockTable


class WriteRevoker(Protocol):
    def revoke(self, job_id: JobId) -> bool:
        """Lets no writer start. False while one writes: `push_ended` follows when it stops."""
        raise NotImplementedError

    def is_unused(self, job_id: JobId) -> bool:
        """Whether no writer has come."""
        raise NotImplementedError


class Reservations:
    def __init__(self, blocks: BlockManager, writers: WriteRevoker) -> None:
        self._blocks = blocks
        self._writers = writers
        self._waiting: dict[str, deque[DecodeJob]] = {}
        """By share, the oldest first."""

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def waiting(self) -> list[DecodeJob]:
        """The oldest first."""
        return sorted((job for jobs in self._waiting.values() for job in jobs), key=lambda job: job.age)

    @property
    def shares(self) -> Set[str]:
        """Those with waiting jobs."""
        return self._waiting.keys()

    def next_of(self, share: str) -> DecodeJob:
        return self._waiting[share][0]

    def add(self, job: DecodeJob) -> None:
        self._waiting.setdefault(job.spec.share, deque()).append(job)

    def reserve(self, job: DecodeJob) -> bool:
        """False if there are too few blocks."""
        try:
            job.prompt_table = self._blocks.allocate(job.spec.token_ids, job.spec.cache_salt)
        except OutOfBlocksError:
            return False
        self._leave(job)
        job.phase = Phase.RESERVED
        return True

    def revoke_writer(self, job: DecodeJob) -> bool:
        return self._writers.revoke(job.job_id)

    def claim(self, job: DecodeJob) -> BlockTable:
        """No push may write into the blocks."""
        assert job.prompt_table is not None, "a reservation has blocks"
        table, job.prompt_table, job.phase = job.prompt_table, None, Phase.RUNNING
        return table

    def withdraw(self, job: DecodeJob) -> bool:
        """False while a push writes into its blocks."""
        if job.phase is Phase.WAITING:
            self._leave(job)
        return job.phase is not Phase.RESERVED or self.revoke_writer(job)

    def to_yield(self, idle: Iterable[DecodeJob], waiting: Iterable[DecodeJob]) -> list[DecodeJob]:
        """What the holder of most `idle` blocks gives back for a job that waits.

        That is its youngest reservation, and its own jobs that wait before that one. Empty if
        all waiting jobs' holders have as many.
        """
        unused = [job for job in idle if job.awaits_push and self._writers.is_unused(job.job_id)]
        num_held: Counter[int] = Counter()
        for job in unused:
            num_held[job.spec.holder] += 0 if job.prompt_table is None else len(job.prompt_table.blocks)
        if not num_held:
            return []
        greediest, num_blocks = num_held.most_common(1)[0]
        ahead: list[DecodeJob] = []
        for blocked in waiting:
            holder = blocked.spec.holder
            if num_held[holder] < num_blocks:
                return [next(job for job in reversed(unused) if job.spec.holder == greediest), *ahead]
            if holder == greediest and blocked.phase is Phase.WAITING:
                ahead.append(blocked)
        return []

    def release(self, job: DecodeJob) -> None:
        if job.prompt_table is not None:
            self._blocks.release(job.prompt_table)
            job.prompt_table = None

    def _leave(self, job: DecodeJob) -> None:
        waiting = self._waiting[job.spec.share]
        waiting.remove(job)
        if not waiting:
            del self._waiting[job.spec.share]
