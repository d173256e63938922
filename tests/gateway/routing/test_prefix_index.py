"""Which worker has which blocks, against a model that remembers everything."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.prefix_index import PrefixIndex
from kvrelay.core.job import CacheChanges
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.kv_cache.prefix_hash import prefix_chain

SIZE = 4
PROMPT = tuple(range(22))
SIZES = {"a": SIZE, "b": SIZE}


def hashes(token_ids: tuple[int, ...], salt: str = "s", block_size: int = SIZE) -> list[bytes]:
    return [prefix for prefix, _ in prefix_chain(token_ids, block_size, salt, len(token_ids) // block_size)]


def index_of(**published: list[bytes]) -> PrefixIndex:
    index = PrefixIndex()
    for worker_id, prefixes in published.items():
        index.apply(worker_id, CacheChanges(tuple(prefixes), forgets_all=True))
    return index


def test_each_worker_counts_as_far_as_it_has_all_blocks() -> None:
    chain = hashes(PROMPT)
    index = index_of(a=chain[:1], b=[*chain[:3], chain[4]])
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": SIZE, "b": 3 * SIZE}
    assert index.cached_tokens({"a": SIZE}, PROMPT, "s") == {"a": SIZE}
    assert index.cached_tokens({"c": SIZE}, PROMPT, "s") == {}


def test_an_end_without_a_beginning_is_nothing() -> None:
    assert index_of(a=hashes(PROMPT)[1:]).cached_tokens(SIZES, PROMPT, "s") == {}


def test_another_tenant_finds_nothing() -> None:
    assert index_of(a=hashes(PROMPT)).cached_tokens(SIZES, PROMPT, "other") == {}


def test_the_last_token_is_always_computed() -> None:
    index = index_of(a=hashes(PROMPT[:20]))
    assert index.cached_tokens(SIZES, PROMPT[:20], "s") == {"a": 16}
    assert index.cached_tokens(SIZES, PROMPT[:21], "s") == {"a": 20}
    assert index.cached_tokens(SIZES, (), "s") == {}


def test_workers_may_have_blocks_of_different_sizes() -> None:
    index = index_of(a=hashes(PROMPT), b=hashes(PROMPT, block_size=3))
    assert index.cached_tokens({"a": SIZE, "b": 3}, PROMPT, "s") == {"a": 20, "b": 21}


def test_what_is_evicted_or_lost_is_forgotten() -> None:
    chain = hashes(PROMPT)
    index = index_of(a=chain, b=chain)
    index.apply("a", CacheChanges(evicted=(chain[2], b"never told....16")))
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": 8, "b": 20}
    index.forget("b")
    index.forget("never told")
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": 8}
    index.apply("a", CacheChanges(tuple(chain[:1]), forgets_all=True))
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": 4}
    assert index.num_entries == 1


def test_a_worker_that_comes_after_another_left_has_none_of_its_blocks() -> None:
    index = index_of(a=hashes(PROMPT))
    index.forget("a")
    index.apply("b", CacheChanges(forgets_all=True))
    assert index.cached_tokens(SIZES, PROMPT, "s") == {}


def test_a_full_index_leaves_out_what_nobody_looked_up_and_ends_before_beginnings() -> None:
    index = PrefixIndex(max_entries=8)
    old, other = hashes(PROMPT), hashes(tuple(range(100, 112)))
    index.apply("a", CacheChanges(tuple(old)))
    index.apply("a", CacheChanges(tuple(other)))
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": 20}
    index.apply("b", CacheChanges(tuple(hashes((*range(200, 220),)))))
    assert index.num_entries == 8
    assert index.cached_tokens(SIZES, PROMPT, "s") == {"a": 12}
    assert index.cached_tokens(SIZES, (*range(100, 112), 1), "s") == {}
    assert index.cached_tokens(SIZES, (*range(200, 220), 1), "s") == {"b": 20}


def test_it_finds_what_the_cache_itself_finds() -> None:
    blocks = BlockManager(8, SIZE)
    table = blocks.allocate(PROMPT, "s")
    blocks.commit(table, PROMPT, len(PROMPT))
    index = PrefixIndex()
    index.apply("a", blocks.take_changes())
    longer = (*PROMPT, 7, 8)
    assert index.cached_tokens(SIZES, longer, "s") == {"a": blocks.match_prefix(longer, "s")} == {"a": 20}
    blocks.release(table)
    blocks.allocate(tuple(range(50, 75)), "s")
    index.apply("a", blocks.take_changes())
    assert index.cached_tokens(SIZES, longer, "s") == {"a": blocks.match_prefix(longer, "s")} == {"a": 4}


CHAINS = [hashes((1, 1, 1, 1, *begin, *begin, 9)) for begin in ((1, 2, 3, 4), (5, 6, 7, 8), (1, 1, 1, 1))]
PREFIXES = sorted({prefix for chain in CHAINS for prefix in chain})
STEPS = st.tuples(
    st.sampled_from("abc"), st.sampled_from(["publish", "evict", "forget", "lost"]), st.sets(st.sampled_from(PREFIXES))
)


@given(st.lists(STEPS, max_size=30), st.integers(1, 30))
def test_it_equals_a_model_while_it_has_room_and_never_grows_beyond_its_bound(
    steps: list[tuple[str, str, set[bytes]]], max_entries: int
) -> None:
    index = PrefixIndex(max_entries)
    model: dict[str, set[bytes]] = {worker_id: set() for worker_id in "abc"}
    fits = True
    for worker_id, step, prefixes in steps:
        if step == "publish":
            index.apply(worker_id, CacheChanges(tuple(prefixes)))
            model[worker_id] |= prefixes
        elif step == "evict":
            index.apply(worker_id, CacheChanges(evicted=tuple(prefixes)))
            model[worker_id] -= prefixes
        elif step == "forget":
            index.apply(worker_id, CacheChanges(tuple(prefixes), forgets_all=True))
            model[worker_id] = set(prefixes)
        else:
            index.forget(worker_id)
            model[worker_id] = set()
        fits = fits and sum(map(len, model.values())) <= max_entries
        assert index.num_entries == sum(len(index.hashes_of(each)) for each in model) <= max_entries
        for each, known in model.items():
            assert index.hashes_of(each) == known if fits else index.hashes_of(each) <= known
