"""Which sequence holds which blocks of the KV pool.

A block is in exactly one of three states:

    free    no reference, no published content
    cached  no reference, published content that a later prompt may share; evicted oldest first
    used    one reference per block table that holds it; may be published as well

Prefix sharing follows vLLM (Kwon et al. 2023, "Efficient Memory Management for Large Language
Model Serving with PagedAttention"). One thread owns a manager.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay.core.job import CacheChanges
from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.pending_changes import PendingChanges
from kvrelay.kv_cache.prefix_hash import chain_hash, pack_tokens, prefix_chain, root_hash


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """To execute, in all layers, before a step writes `target`."""

    source: int
    target: int


@dataclass(slots=True, eq=False)
class BlockTable:
    """Token t lies in `blocks[t // block_size]`."""

    salt: str
    blocks: list[int]
    num_tokens: int  # room by `allocate` and `grow`
    num_cached_tokens: int = 0  # leading ones whose KV was in the pool at allocation
    hashes: list[bytes] = field(default_factory=list)  # of leading published blocks


@dataclass(frozen=True, slots=True)
class _Published:
    """Compared on a hit, so that hash collisions do not share."""

    prefix: bytes
    parent: bytes
    tokens: bytes


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self.num_prefix_hit_tokens = 0  # of all allocations
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._published: list[_Published | None] = [None] * num_blocks
        self._block_by_prefix: dict[bytes, int] = {}
        self._changes = PendingChanges()
        self._tables: set[BlockTable] = set()

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Allocations take them like free ones."""
        return len(self._cached)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, token_ids: Sequence[int], salt: str) -> int:
        """Leading tokens with KV in the pool: whole blocks, never all tokens."""
        return len(self._match(token_ids, salt)) * self.block_size

    def allocate(self, token_ids: Sequence[int], salt: str) -> BlockTable:
        """Shares the blocks of the longest cached prefix.

        Raises:
            OutOfBlocksError: nothing has changed.
        """
        matched = self._match(token_ids, salt)
        num_missing = self._num_missing_blocks(len(token_ids), matched)
        if num_missing > 0:
            raise OutOfBlocksError(
                f"{num_missing} more KV blocks are needed than are free; retry when other requests are done"
            )
        for block in matched:
            self._acquire(block)
        num_new_blocks = self.blocks_for(len(token_ids)) - len(matched)
        table = BlockTable(
            salt=salt,
            blocks=matched + [self._take() for _ in range(num_new_blocks)],
            num_tokens=len(token_ids),
            num_cached_tokens=len(matched) * self.block_size,
            hashes=[self._published_in(block).prefix for block in matched],
        )
        self._tables.add(table)
        self.num_prefix_hit_tokens += table.num_cached_tokens
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> list[BlockCopy]:
        """Makes room for `num_tokens`, and unshares every block that will be written.

            | held before, not written again | tokens to write          |
            0                          table.num_tokens            num_tokens

        The last token's block is always unshared, so that growing again after a fork is safe. The
        copies must be executed before the next step.

        Raises:
            OutOfBlocksError: nothing has changed.
        """
        assert table in self._tables, "the table was released"
        assert num_tokens > 0
        first_written = min(table.num_tokens, num_tokens - 1) // self.block_size
        num_blocks = -(-num_tokens // self.block_size)
        if first_written == num_blocks - 1 < len(table.blocks) and self._references[table.blocks[first_written]] == 1:
            # As in nearly every step: the last block has room and is not shared.
            table.num_tokens = max(table.num_tokens, num_tokens)
            return []
        shared = [
            number
            for number in range(first_written, min(num_blocks, len(table.blocks)))
            if self._is_shared(table, number)
        ]
        num_new_blocks = max(0, num_blocks - len(table.blocks))
        num_missing = len(shared) + num_new_blocks - len(self._free) - len(self._cached)
        if num_missing > 0:
            raise OutOfBlocksError(
                f"{num_missing} more KV blocks are needed than are free; retry when other requests are done"
            )
        copies = [self._unshare(table, number) for number in shared]
        table.blocks.extend(self._take() for _ in range(num_new_blocks))
        table.num_tokens = max(table.num_tokens, num_tokens)
        return copies

    def shrink(self, table: BlockTable, num_tokens: int) -> None:
        assert table in self._tables, "the table was released"
        num_blocks = self.blocks_for(num_tokens)
        assert len(table.hashes) <= num_blocks, "what was committed is kept"
        while len(table.blocks) > num_blocks:
            self._drop_reference(table.blocks.pop())
        table.num_tokens = min(table.num_tokens, num_tokens)

    def fork(self, table: BlockTable) -> BlockTable:
        """Shares the blocks; the first to write to one gets a copy."""
        assert table in self._tables, "the table was released"
        for block in table.blocks:
            self._references[block] += 1
        twin = BlockTable(table.salt, list(table.blocks), table.num_tokens, table.num_cached_tokens, list(table.hashes))
        self._tables.add(twin)
        return twin

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Publishes full blocks with computed KV, so that later prompts may share them."""
        assert table in self._tables, "the table was released"
        assert num_computed_tokens <= min(len(token_ids), len(table.blocks) * self.block_size)
        if not self.enable_prefix_cache:
            return
        for number in range(len(table.hashes), num_computed_tokens // self.block_size):
            parent = table.hashes[-1] if table.hashes else root_hash(table.salt)
            tokens = pack_tokens(token_ids[number * self.block_size : (number + 1) * self.block_size])
            prefix = chain_hash(parent, tokens)
            table.hashes.append(prefix)
            self._publish(table.blocks[number], _Published(prefix, parent, tokens))

    def release(self, table: BlockTable) -> None:
        """Frees the blocks; published ones stay cached. Idempotent."""
        if table not in self._tables:
            return
        self._tables.remove(table)
        # The end of a prefix is evicted first: without its start it cannot be found.
        for block in reversed(table.blocks):
            self._drop_reference(block)
        table.blocks = []
        table.hashes = []
        table.num_tokens = 0

    def take_changes(self) -> CacheChanges:
        """Of published prefixes, since the last call."""
        return self._changes.take()

    @property
    def prefixes(self) -> frozenset[bytes]:
        return frozenset(self._block_by_prefix)

    def check_integrity(self) -> None:
        held = Counter(block for table in self._tables for block in table.blocks)
        used = {block for block, references in enumerate(self._references) if references > 0}
        free, cached = set(self._free), set(self._cached)
        assert all(held[block] == references for block, references in enumerate(self._references)), (
            "references do not add up"
        )
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(cached), "a block is both free and cached"
        assert used.isdisjoint(free | cached), "a used block is free or cached"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "free + cached + used is not the total"
        assert all(self._published[block] is None for block in free), "a free block is published"
        assert all(self._published[block] is not None for block in cached), "a cached block is not published"
        published = {content.prefix: block for block, content in enumerate(self._published) if content is not None}
        assert published == self._block_by_prefix, "published blocks and their index differ"
        assert all(len(set(table.blocks)) == len(table.blocks) for table in self._tables), "a table holds a block twice"

    def _match(self, token_ids: Sequence[int], salt: str) -> list[int]:
        blocks: list[int] = []
        if not self.enable_prefix_cache or not self._block_by_prefix:
            return blocks
        parent = root_hash(salt)
        num_blocks = max(0, len(token_ids) - 1) // self.block_size
        for prefix, tokens in prefix_chain(token_ids, self.block_size, salt, num_blocks):
            block = self._block_by_prefix.get(prefix)
            if block is None or self._published[block] != _Published(prefix, parent, tokens):
                break
            blocks.append(block)
            parent = prefix
        return blocks

    def _num_missing_blocks(self, num_tokens: int, matched: list[int]) -> int:
        num_cached_matches = sum(1 for block in matched if block in self._cached)
        num_available = len(self._free) + len(self._cached) - num_cached_matches
        return self.blocks_for(num_tokens) - len(matched) - num_available

    def _published_in(self, block: int) -> _Published:
        published = self._published[block]
        assert published is not None
        return published

    def _acquire(self, block: int) -> None:
        self._cached.pop(block, None)
        self._references[block] += 1

    def _take(self) -> int:
        """Evicts the cached block that was released longest ago."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._unpublish(block)
        assert self._references[block] == 0
        self._references[block] = 1
        return block

    def _drop_reference(self, block: int) -> None:
        assert self._references[block] > 0
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        if self._published[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _is_shared(self, table: BlockTable, number: int) -> bool:
        return self._references[table.blocks[number]] > 1

    def _unshare(self, table: BlockTable, number: int) -> BlockCopy:
        source = table.blocks[number]
        target = self._take()
        table.blocks[number] = target
        self._drop_reference(source)
        # The next write may differ from the published content.
        del table.hashes[number:]
        return BlockCopy(source, target)

    def _publish(self, block: int, content: _Published) -> None:
        if content.prefix in self._block_by_prefix or self._published[block] is not None:
            return
        self._published[block] = content
        self._block_by_prefix[content.prefix] = block
        self._changes.publish(content.prefix)

    def _unpublish(self, block: int) -> None:
        content = self._published_in(block)
        self._published[block] = None
        del self._block_by_prefix[content.prefix]
        self._changes.evict(content.prefix)
