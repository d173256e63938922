"""Which worker has which blocks in its prefix cache. Pure.

    prompt   | block 0 | block 1 | block 2 |
    holders     a, b        a         a        a: 3 blocks, b: 1 block

An entry is a block and a worker. Blocks looked up longest ago go first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from kvrelay.core.job import CacheChanges
from kvrelay.kv_cache.prefix_hash import prefix_chain

MAX_ENTRIES = 262_144
MAX_MATCHED_BLOCKS = 4096


class PrefixIndex:
    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self.num_entries = 0
        self._max_entries = max_entries
        self._holders: OrderedDict[bytes, int] = OrderedDict()
        """A bit for each worker, by hash."""
        self._bits: dict[str, int] = {}
        self._blocks: dict[int, set[bytes]] = {}
        """By bit."""

    def apply(self, worker_id: str, changes: CacheChanges) -> None:
        if changes.forgets_all:
            self.forget(worker_id)
        bit = self._bits.get(worker_id) or self._new_bit(worker_id)
        for prefix in changes.evicted:
            self._discard(prefix, bit)
        for prefix in changes.published:
            self._add(prefix, bit)

    def forget(self, worker_id: str) -> None:
        bit = self._bits.pop(worker_id, None)
        if bit is not None:
            for prefix in tuple(self._blocks[bit]):
                self._discard(prefix, bit)
            del self._blocks[bit]

    def cached_tokens(self, block_sizes: Mapping[str, int], token_ids: Sequence[int], salt: str) -> dict[str, int]:
        """Returns leading tokens that are cached, by worker; none for a worker without any.

        `block_sizes`: of the workers to look at.
        """
        found: dict[str, int] = {}
        for block_size in set(block_sizes.values()):
            bits = {
                self._bits[each]: each
                for each, size in block_sizes.items()
                if size == block_size and each in self._bits
            }
            # One token is always computed, because the next is sampled from it.
            num_blocks = min((len(token_ids) - 1) // block_size, MAX_MATCHED_BLOCKS)
            chain = (prefix for prefix, _ in prefix_chain(token_ids, block_size, salt, num_blocks))
            for bit, depth in self._depths(chain, bits).items():
                found[bits[bit]] = depth * block_size
        return found

    def hashes_of(self, worker_id: str) -> frozenset[bytes]:
        return frozenset(self._blocks.get(self._bits.get(worker_id, 0), ()))

    def _depths(self, chain: Iterable[bytes], bits: Iterable[int]) -> dict[int, int]:
        depths: dict[int, int] = {}
        matched: list[bytes] = []
        holders = sum(bits)
        for prefix in chain if holders else ():
            remaining = holders & self._holders.get(prefix, 0)
            for bit in _bits_of(holders & ~remaining) if matched else ():
                depths[bit] = len(matched)
            holders = remaining
            if not holders:
                break
            matched.append(prefix)
        depths.update((bit, len(matched)) for bit in _bits_of(holders) if matched)
        for prefix in reversed(matched):  # a prefix without its start cannot be found
            self._holders.move_to_end(prefix)
        return depths

    def _new_bit(self, worker_id: str) -> int:
        used = sum(self._blocks)
        bit = ~used & (used + 1)  # the lowest that is free
        self._bits[worker_id] = bit
        self._blocks[bit] = set()
        return bit

    def _add(self, prefix: bytes, bit: int) -> None:
        holders = self._holders.get(prefix, 0)
        if holders & bit:
            return
        while self.num_entries >= self._max_entries:
            self._leave_out_oldest()
        self._holders[prefix] = self._holders.get(prefix, 0) | bit
        self._blocks[bit].add(prefix)
        self.num_entries += 1

    def _discard(self, prefix: bytes, bit: int) -> None:
        holders = self._holders.get(prefix, 0)
        if not holders & bit:
            return
        self._blocks[bit].discard(prefix)
        self.num_entries -= 1
        if holders == bit:
            del self._holders[prefix]
        else:
            self._holders[prefix] = holders & ~bit

    def _leave_out_oldest(self) -> None:
        prefix = next(iter(self._holders))
        for bit in _bits_of(self._holders[prefix]):
            self._discard(prefix, bit)


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
