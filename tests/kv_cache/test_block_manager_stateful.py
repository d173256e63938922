"""Random lives of sequences against a model of what every block holds.

The model keeps, for each block, the tokens whose KV the engine would have written there. After
every rule each live sequence must find exactly its own tokens in its blocks: sharing, copy on write
and eviction never give it those of another.
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockManager, BlockTable

SIZE = 3
NUM_BLOCKS = 9
PROMPTS = st.tuples(st.sampled_from([3, 4, 6, 7]), st.integers(0, 5))
"""How many zeros and then ones: prompts that often share a prefix."""


@dataclass(eq=False)
class Life:
    """One sequence: `token_ids[:num_computed]` have KV."""

    table: BlockTable
    token_ids: list[int]
    salt: str
    num_computed: int


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, SIZE)
        # What lies in each slot: (salt, all tokens up to and including it), for KV depends on them
        # all.
        self.slots: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.live: list[Life] = []
        self.told: set[bytes] = set()

    def write(self, life: Life, end: int) -> None:
        """Computes tokens up to `end`, as a step would."""
        for token in range(life.num_computed, end):
            slot = life.table.blocks[token // SIZE] * SIZE + token % SIZE
            self.slots[slot] = (life.salt, tuple(life.token_ids[: token + 1]))
        life.num_computed = max(life.num_computed, end)

    def pick(self, number: int) -> Life:
        return self.live[number % len(self.live)]

    @rule(prompt=PROMPTS, salt=st.sampled_from(["", "", "other"]), compute=st.booleans())
    def allocate(self, prompt: tuple[int, int], salt: str, compute: bool) -> None:
        token_ids = [0] * prompt[0] + [1] * prompt[1]
        expected = self.manager.match_prefix(token_ids, salt)
        fits = self.fits(token_ids, salt)
        before = self.numbers()
        try:
            table = self.manager.allocate(token_ids, salt)
        except OutOfBlocksError:
            assert not fits
            assert self.numbers() == before
            event("allocation refused")
            return
        assert fits
        assert table.num_cached_tokens == expected < len(token_ids)
        event("prefix hit" if expected else "no prefix hit")
        life = Life(table, list(token_ids), salt, table.num_cached_tokens)
        self.live.append(life)
        if compute:
            self.compute_until(life, len(token_ids))

    def fits(self, token_ids: list[int], salt: str) -> bool:
        """Whether the blocks that nothing holds are enough, less the cached ones that the prefix
        itself is in.
        """
        held = {block for life in self.live for block in life.table.blocks}
        matched = self.manager._match(token_ids, salt)
        num_left = NUM_BLOCKS - len(held | set(matched))
        return self.manager.blocks_for(len(token_ids)) - len(matched) <= num_left

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 99), num_tokens=st.integers(1, 6))
    def compute_a_chunk(self, number: int, num_tokens: int) -> None:
        life = self.pick(number)
        self.compute_until(life, min(len(life.token_ids), life.num_computed + num_tokens))

    def compute_until(self, life: Life, end: int) -> bool:
        if not self.make_writable(life, end):
            return False
        self.write(life, end)
        self.manager.commit(life.table, life.token_ids, life.num_computed)
        return True

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 99), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def decode(self, number: int, token_ids: list[int]) -> None:
        """Samples tokens where all before is computed, and computes them one by one."""
        life = self.pick(number)
        if life.num_computed < len(life.token_ids):
            return
        for token_id in token_ids:
            life.token_ids.append(token_id)
            if not self.compute_until(life, len(life.token_ids)):
                life.token_ids.pop()
                return

    @precondition(lambda self: self.live)
    @rule(
        number=st.integers(0, 99),
        drafts=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        num_right=st.integers(0, 5),
    )
    def speculate(self, number: int, drafts: list[int], num_right: int) -> None:
        """Samples a token and computes it together with guesses for those behind it, of which the
        first ones are right.
        """
        life = self.pick(number)
        if life.num_computed < len(life.token_ids):
            return
        life.token_ids.append(0)
        begin = len(life.token_ids)
        if not self.make_writable(life, begin):
            life.token_ids.pop()
            return
        if not self.make_writable(life, begin + len(drafts)):
            drafts = drafts[: len(life.table.blocks) * SIZE - begin]
        life.token_ids += drafts
        self.write(life, len(life.token_ids))
        life.num_computed = begin + min(num_right, len(drafts))
        del life.token_ids[life.num_computed :]
        self.manager.commit(life.table, life.token_ids, life.num_computed)
        self.manager.shrink(life.table, life.num_computed)
        assert len(life.table.blocks) == self.manager.blocks_for(life.num_computed)
        event("a wrong guess" if num_right < len(drafts) else "all guesses right")

    def make_writable(self, life: Life, end: int) -> bool:
        before = self.numbers()
        blocks = list(life.table.blocks)
        try:
            copies = self.manager.grow(life.table, end)
        except OutOfBlocksError:
            assert self.numbers() == before
            assert life.table.blocks == blocks
            event("growth refused")
            return False
        for copy in copies:
            event("copy on write")
            for offset in range(SIZE):
                content = self.slots.get(copy.source * SIZE + offset)
                if content is not None:
                    self.slots[copy.target * SIZE + offset] = content
        return True

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 99), diverge=st.booleans())
    def fork(self, number: int, diverge: bool) -> None:
        life = self.pick(number)
        # As the engine does: only once the prompt is computed.
        if life.num_computed < len(life.token_ids):
            return
        twin = Life(self.manager.fork(life.table), list(life.token_ids), life.salt, life.num_computed)
        self.live.append(twin)
        if diverge:
            for one, token_id in ((life, 0), (twin, 1)):
                one.token_ids.append(token_id)
                if not self.compute_until(one, len(one.token_ids)):
                    one.token_ids.pop()

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        life = self.pick(number)
        self.live.remove(life)
        self.manager.release(life.table)
        self.manager.release(life.table)

    def numbers(self) -> tuple[int, int, int]:
        return self.manager.num_free_blocks, self.manager.num_cached_blocks, self.manager.num_used_blocks

    @invariant()
    def blocks_add_up(self) -> None:
        self.manager.check_integrity()
        assert sum(self.numbers()) == NUM_BLOCKS

    @invariant()
    def every_sequence_finds_its_own_tokens(self) -> None:
        for life in self.live:
            for token in range(life.num_computed):
                slot = life.table.blocks[token // SIZE] * SIZE + token % SIZE
                assert self.slots[slot] == (life.salt, tuple(life.token_ids[: token + 1]))

    @rule()
    def tell(self) -> None:
        """What the changes add up to is what is published."""
        changes = self.manager.take_changes()
        assert self.told.isdisjoint(changes.published)
        assert self.told.issuperset(changes.evicted)
        self.told = (self.told | set(changes.published)) - set(changes.evicted)
        assert self.told == self.manager.prefixes
        event("evictions told" if changes.evicted else "no eviction told")

    def teardown(self) -> None:
        for life in self.live:
            self.manager.release(life.table)
        self.manager.check_integrity()
        assert self.manager.num_used_blocks == 0


BlockManagerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBlockManager = pytest.mark.timeout(300)(BlockManagerMachine.TestCase)
