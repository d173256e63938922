"""Who gets freed blocks and slots of a decode worker. Pure.

The share that holds the least is next; within a share, preempted sequences go before waiting jobs
and the oldest before younger ones. If the next one finds no room:

    it may take from the share with the most    if that still holds as much as it afterwards
    all others wait                             if its share holds nothing, or less than another
    the others go on                            else: its own share's ends give it room
"""

from collections.abc import Collection

from decode_worker.scheduling.reservations import Reservations
from decode_worker.scheduling.running_batch import RunningBatch
from decode_worker.scheduling.running_sequence import DecodeJob, RunningSequence
from decode_worker.scheduling.share_holdings import ShareHoldings
from kvrelay.core.fair_turns import SeenShares
from kvrelay.kv_cache.block_manager import BlockManager


class FairAdmission:
    def __init__(
        self, blocks: BlockManager, batch: RunningBatch, reservations: Reservations, max_sequences: int
    ) -> None:
        self._blocks = blocks
        self._batch = batch
        self._reservations = reservations
        self._max_sequences = max_sequences
        self._seen_shares = SeenShares()

    def add(self, job: DecodeJob) -> None:
        self._reservations.add(job)
        self._seen_shares.add(job.spec.share)

    def admit_next(self, jobs: Collection[DecodeJob], isolated: DecodeJob | None) -> DecodeJob | None:
        """Readmits preempted sequences up to the next job, and reserves its blocks.

        Returns None if no share has room.
        """
        passed: set[str] = set()
        while shares := (self._reservations.shares | self._batch.preempted_shares) - passed:
            holdings = ShareHoldings(jobs, self._blocks, self._max_sequences)
            share = min(shares, key=lambda each: (holdings.of(each), self._age_of_next(each)))
            preempted = self._batch.next_preempted(share)
            if preempted is not None:
                need = len(preempted.sequence_ids), self._blocks.blocks_for(len(preempted.token_ids))
                if holdings.num_slots + need[0] <= self._max_sequences and self._batch.readmit(preempted):
                    continue
            else:
                job = self._reservations.next_of(share)
                need = job.spec.num_sequences, self._blocks.blocks_for(len(job.spec.token_ids))
                if self._reserve(job, need, holdings, isolated):
                    return job
            held = holdings.of(share)
            if held == 0 or holdings.with_more(share, *need) <= holdings.most_of_others(share):
                return None
            passed.add(share)
        return None

    def _age_of_next(self, share: str) -> tuple[int, int]:
        preempted = self._batch.next_preempted(share)
        return preempted.age if preempted is not None else (self._reservations.next_of(share).age, 0)

    def _reserve(
        self, job: DecodeJob, need: tuple[int, int], holdings: ShareHoldings, isolated: DecodeJob | None
    ) -> bool:
        if job.spec.isolated and isolated is not None:
            return False
        if self._seen_shares.are_several and not holdings.leaves_room(job.spec.share, *need):
            return False
        has_slots = holdings.num_slots + need[0] <= self._max_sequences
        if has_slots and self._reservations.reserve(job):
            return True
        # An isolated job must end soon, and its blocks are not others'.
        if isolated is not None or not self._make_room(job, need, holdings):
            return False
        return self._reservations.reserve(job)

    def _make_room(self, job: DecodeJob, need: tuple[int, int], holdings: ShareHoldings) -> bool:
        """Preempts sequences of shares that hold more, the youngest first; all that it takes or none."""
        share = job.spec.share
        wanted = holdings.with_more(share, *need)
        num_available = self._blocks.num_free_blocks + self._blocks.num_cached_blocks
        slots_lacking = holdings.num_slots + need[0] - self._max_sequences
        blocks_lacking = need[1] - num_available
        by_share: dict[str, list[RunningSequence]] = {}
        for sequence in self._batch.running[1:]:  # some sequence always advances: the oldest
            by_share.setdefault(sequence.job.share, []).append(sequence)
        by_share.pop(share, None)
        victims: list[RunningSequence] = []
        while slots_lacking > 0 or blocks_lacking > 0:
            giver = max(by_share, key=holdings.of, default=None)
            if giver is None:
                return False
            victim = by_share[giver].pop()
            if not by_share[giver]:
                del by_share[giver]
            given = len(victim.sequence_ids), len(victim.table.blocks)
            if holdings.with_more(giver, -given[0], -given[1]) < wanted:
                return False
            holdings.take(giver, *given)
            slots_lacking -= given[0]
            blocks_lacking -= given[1]
            victims.append(victim)
        for victim in victims:
            self._batch.preempt(victim)
        return True
