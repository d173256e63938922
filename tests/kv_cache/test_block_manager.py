import pytest

from kvrelay.errors import OutOfBlocksError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager, BlockTable

SIZE = 4


def make_manager(num_blocks: int = 8, *, enable_prefix_cache: bool = True) -> BlockManager:
    return BlockManager(num_blocks, SIZE, enable_prefix_cache)


def compute(manager: BlockManager, token_ids: list[int], salt: str = "") -> BlockTable:
    """Allocates, and commits as if all KV were computed."""
    table = manager.allocate(token_ids, salt)
    manager.commit(table, token_ids, len(token_ids))
    manager.check_integrity()
    return table


def counts(manager: BlockManager) -> tuple[int, int, int]:
    manager.check_integrity()
    return manager.num_free_blocks, manager.num_cached_blocks, manager.num_used_blocks


class TestAllocate:
    def test_gives_blocks_for_all_tokens(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(9)), "")
        assert len(set(table.blocks)) == 3
        assert table.num_tokens == 9
        assert table.num_cached_tokens == 0
        assert counts(manager) == (5, 0, 3)

    def test_is_all_or_nothing(self) -> None:
        manager = make_manager(3)
        manager.allocate(list(range(5)), "")
        with pytest.raises(OutOfBlocksError, match="1 more"):
            manager.allocate(list(range(100, 105)), "")
        assert counts(manager) == (1, 0, 2)

    def test_takes_the_last_block(self) -> None:
        manager = make_manager(3)
        manager.allocate(list(range(12)), "")
        assert counts(manager) == (0, 0, 3)


class TestShrink:
    def test_gives_back_what_is_not_needed_and_keeps_what_is(self) -> None:
        manager = make_manager()
        table = compute(manager, list(range(5)))
        blocks = list(table.blocks)
        manager.grow(table, 14)
        assert counts(manager) == (4, 0, 4)
        manager.shrink(table, 6)
        assert table.blocks == blocks
        assert counts(manager) == (6, 0, 2)
        assert manager.grow(table, 9) == []
        assert counts(manager) == (5, 0, 3)

    def test_tokens_behind_it_are_written_again(self) -> None:
        """A twin that was made meanwhile keeps its own."""
        manager = make_manager()
        table = compute(manager, list(range(4)))
        manager.grow(table, 7)
        manager.shrink(table, 5)
        manager.fork(table)
        [copy] = manager.grow(table, 7)
        assert table.blocks[1] == copy.target


class TestPrefixCache:
    def test_a_running_sequence_shares_its_prefix(self) -> None:
        manager = make_manager()
        first = compute(manager, list(range(8)))
        second = manager.allocate([*range(8), 100], "")
        assert second.num_cached_tokens == 8
        assert second.blocks[:2] == first.blocks
        assert counts(manager) == (5, 0, 3)

    def test_a_finished_sequence_leaves_its_prefix(self) -> None:
        manager = make_manager()
        first = compute(manager, list(range(9)))
        blocks = list(first.blocks)
        manager.release(first)
        assert counts(manager) == (6, 2, 0)
        assert manager.match_prefix([*range(8), 7, 7], "") == 8
        second = manager.allocate([*range(8), 7, 7], "")
        assert second.blocks[:2] == blocks[:2]
        assert counts(manager) == (5, 0, 3)

    def test_one_token_is_always_left_to_compute(self) -> None:
        manager = make_manager()
        compute(manager, list(range(8)))
        assert manager.match_prefix(list(range(8)), "") == 4
        assert manager.match_prefix(list(range(4)), "") == 0
        assert manager.match_prefix([], "") == 0
        assert manager.allocate(list(range(8)), "").num_cached_tokens == 4

    def test_another_salt_finds_nothing(self) -> None:
        manager = make_manager()
        compute(manager, list(range(9)), "tenant a")
        assert manager.match_prefix(list(range(9)), "tenant b") == 0
        assert manager.match_prefix(list(range(9)), "tenant a") == 8

    def test_only_computed_tokens_are_published(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(9)), "")
        assert manager.match_prefix(list(range(9)), "") == 0
        manager.commit(table, list(range(9)), 7)
        assert manager.match_prefix(list(range(9)), "") == 4
        manager.commit(table, list(range(9)), 9)
        assert manager.match_prefix(list(range(9)), "") == 8

    def test_what_was_never_computed_is_forgotten(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(9)), "")
        manager.release(table)
        assert counts(manager) == (8, 0, 0)

    def test_the_prefix_released_longest_ago_is_evicted_first_and_its_end_before_its_start(self) -> None:
        manager = make_manager(6)
        old, new = list(range(8)), list(range(100, 108))
        for token_ids in (old, new):
            manager.release(compute(manager, token_ids))
        assert counts(manager) == (2, 4, 0)
        manager.allocate(list(range(200, 212)), "")
        assert manager.match_prefix([*old, 0], "") == 4
        assert manager.match_prefix([*new, 0], "") == 8

    def test_a_hit_makes_a_prefix_young_again(self) -> None:
        manager = make_manager(4)
        old, new = list(range(4)), list(range(100, 104))
        for token_ids in (old, new):
            manager.release(compute(manager, token_ids))
        manager.release(manager.allocate([*old, 9], ""))
        manager.allocate(list(range(200, 212)), "")
        assert manager.match_prefix([*old, 0], "") == 4
        assert manager.match_prefix([*new, 0], "") == 0

    def test_cached_blocks_of_the_own_prefix_do_not_count_as_room(self) -> None:
        manager = make_manager(3)
        manager.release(compute(manager, list(range(8))))
        # Two cached blocks are shared, so only one is left for the other two.
        assert manager.match_prefix(list(range(16)), "") == 8
        with pytest.raises(OutOfBlocksError):
            manager.allocate(list(range(16)), "")
        assert counts(manager) == (1, 2, 0)
        manager.allocate(list(range(12)), "")
        assert counts(manager) == (0, 0, 3)

    def test_the_same_prefix_computed_twice_is_cached_once(self) -> None:
        manager = make_manager()
        first = manager.allocate(list(range(5)), "")
        second = manager.allocate(list(range(5)), "")
        manager.commit(first, list(range(5)), 5)
        manager.commit(second, list(range(5)), 5)
        manager.release(first)
        manager.release(second)
        assert counts(manager) == (7, 1, 0)

    def test_equal_names_of_unequal_tokens_do_not_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("block_manager", "prefix_hash"):
            monkeypatch.setattr(f"kvrelay.kv_cache.{module}.chain_hash", lambda parent, tokens: b"the same")
        manager = make_manager()
        compute(manager, [1, 2, 3, 4])
        assert manager.match_prefix([1, 2, 3, 4, 0], "") == 4
        assert manager.match_prefix([1, 2, 3, 5, 0], "") == 0

    def test_can_be_switched_off(self) -> None:
        manager = make_manager(enable_prefix_cache=False)
        manager.release(compute(manager, list(range(9))))
        assert manager.match_prefix(list(range(9)), "") == 0
        assert counts(manager) == (8, 0, 0)


class TestGrow:
    def test_within_the_last_block_takes_nothing(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(5)), "")
        assert manager.grow(table, 8) == []
        assert len(table.blocks) == 2

    def test_beyond_it_takes_blocks(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(5)), "")
        assert manager.grow(table, 13) == []
        assert len(table.blocks) == 4
        assert counts(manager) == (4, 0, 4)

    def test_without_room_changes_nothing(self) -> None:
        manager = make_manager(2)
        table = manager.allocate(list(range(8)), "")
        before = list(table.blocks)
        with pytest.raises(OutOfBlocksError):
            manager.grow(table, 9)
        assert table.blocks == before
        assert table.num_tokens == 8
        assert counts(manager) == (0, 0, 2)

    def test_evicts_cached_blocks(self) -> None:
        manager = make_manager(3)
        manager.release(compute(manager, list(range(100, 108))))
        table = manager.allocate([1], "")
        manager.grow(table, 9)
        assert counts(manager) == (0, 0, 3)
        assert manager.match_prefix(list(range(100, 109)), "") == 0


class TestFork:
    def test_shares_all_blocks(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(6)), "")
        twin = manager.fork(table)
        assert twin.blocks == table.blocks
        assert counts(manager) == (6, 0, 2)

    def test_the_first_to_write_a_shared_block_gets_a_copy(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(6)), "")
        twin = manager.fork(table)
        shared = table.blocks[1]
        assert manager.grow(table, 7) == [BlockCopy(shared, table.blocks[1])]
        assert table.blocks[1] != shared
        assert twin.blocks[1] == shared
        assert manager.grow(twin, 7) == []
        assert table.blocks[0] == twin.blocks[0]
        assert counts(manager) == (5, 0, 3)

    def test_full_shared_blocks_are_never_copied(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(8)), "")
        twin = manager.fork(table)
        assert manager.grow(table, 9) == []
        assert manager.grow(twin, 9) == []
        assert table.blocks[:2] == twin.blocks[:2]
        assert table.blocks[2] != twin.blocks[2]

    def test_growing_again_after_a_fork_copies_the_last_token_s_block(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(7)), "")
        manager.grow(table, 8)
        twin = manager.fork(table)
        assert len(manager.grow(table, 8)) == 1
        assert manager.grow(twin, 8) == []

    def test_without_room_for_the_copy_changes_nothing(self) -> None:
        manager = make_manager(2)
        table = manager.allocate(list(range(6)), "")
        twin = manager.fork(table)
        with pytest.raises(OutOfBlocksError):
            manager.grow(table, 7)
        assert table.blocks == twin.blocks
        assert counts(manager) == (0, 0, 2)

    def test_blocks_are_given_back_with_the_last_twin(self) -> None:
        manager = make_manager()
        table = compute(manager, list(range(6)))
        twins = [manager.fork(table) for _ in range(3)]
        manager.release(table)
        manager.release(twins[0])
        manager.release(twins[1])
        assert counts(manager) == (6, 0, 2)
        manager.release(twins[2])
        assert counts(manager) == (7, 1, 0)

    def test_twins_publish_what_they_generate_apart(self) -> None:
        manager = make_manager()
        prompt = [1, 2, 3, 4, 5, 6]
        table = compute(manager, prompt)
        twin = manager.fork(table)
        for one, last in ((table, 7), (twin, 8)):
            token_ids = [*prompt, last, 9]
            manager.grow(one, 8)
            manager.commit(one, token_ids, 8)
            assert manager.match_prefix([*token_ids, 0], "") == 8
        assert manager.match_prefix([*prompt, 7, 9, 0], "") == 8


class TestRelease:
    def test_twice_does_nothing(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(6)), "")
        other = manager.allocate(list(range(6)), "")
        manager.release(table)
        manager.release(table)
        assert counts(manager) == (6, 0, 2)
        manager.release(other)
        assert counts(manager) == (8, 0, 0)

    def test_a_released_table_cannot_be_used(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(6)), "")
        manager.release(table)
        for use in (lambda: manager.grow(table, 7), lambda: manager.fork(table), lambda: manager.commit(table, [1], 1)):
            with pytest.raises(AssertionError, match="released"):
                use()


class TestCheckIntegrity:
    def test_finds_a_leaked_reference(self) -> None:
        manager = make_manager()
        table = manager.allocate(list(range(6)), "")
        table.blocks.pop()
        with pytest.raises(AssertionError, match="references"):
            manager.check_integrity()

    def test_finds_a_block_that_is_free_twice(self) -> None:
        manager = make_manager()
        manager._free.append(manager._free[0])
        with pytest.raises(AssertionError, match="free twice"):
            manager.check_integrity()

    def test_finds_a_lost_block(self) -> None:
        manager = make_manager()
        manager._free.pop()
        with pytest.raises(AssertionError, match="total"):
            manager.check_integrity()
