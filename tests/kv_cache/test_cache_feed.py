"""What gateways are told of a prefix cache: complete, in order, and bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.core.job import CacheChanges
from kvrelay.kv_cache import cache_feed
from kvrelay.kv_cache.cache_feed import MAX_CHANGES_IN_MESSAGE, MAX_PENDING_CHANGES, CacheFeed
from kvrelay.kv_cache.pending_changes import PendingChanges


def prefix(number: int) -> bytes:
    return number.to_bytes(16, "big")


def prefixes(begin: int, end: int) -> tuple[bytes, ...]:
    return tuple(map(prefix, range(begin, end)))


class Told:
    """A gateway's view of a cache that changes."""

    def __init__(self, cached: tuple[bytes, ...] = ()) -> None:
        self.cached = dict.fromkeys(cached)
        self.feed = CacheFeed(self.cached)
        self.known: set[bytes] = set()
        self.num_forgotten = 0

    def change(self, published: tuple[bytes, ...] = (), evicted: tuple[bytes, ...] = ()) -> None:
        for each in evicted:
            del self.cached[each]
        self.cached.update(dict.fromkeys(published))
        self.feed.add(CacheChanges(published, evicted))

    def take(self) -> CacheChanges:
        changes = self.feed.take()
        assert len(changes.published) + len(changes.evicted) <= cache_feed.MAX_CHANGES_IN_MESSAGE
        if changes.forgets_all:
            self.known.clear()
            self.num_forgotten += 1
        self.known.difference_update(changes.evicted)
        self.known.update(changes.published)
        return changes

    def take_all(self) -> None:
        while self.feed.has_news:
            self.take()


def test_changes_that_cancel_out_are_left_out() -> None:
    pending = PendingChanges()
    pending.publish(prefix(1))
    pending.evict(prefix(2))
    pending.evict(prefix(1))
    pending.publish(prefix(2))
    pending.publish(prefix(3))
    assert pending.take() == CacheChanges((prefix(3),))
    assert not pending.take()


def test_a_session_begins_with_all_that_is_cached() -> None:
    told = Told(prefixes(0, 3 * MAX_CHANGES_IN_MESSAGE))
    first = told.take()
    assert first.forgets_all
    assert len(first.published) == MAX_CHANGES_IN_MESSAGE
    told.take_all()
    assert told.known == set(told.cached)
    assert told.num_forgotten == 1


def test_an_empty_cache_is_told_too() -> None:
    told = Told()
    assert told.feed.has_news
    assert told.take() == CacheChanges(forgets_all=True)
    assert not told.feed.has_news


def test_too_many_untold_changes_give_way_to_a_list() -> None:
    told = Told()
    told.take_all()
    told.change(prefixes(0, MAX_PENDING_CHANGES))
    told.take()
    assert told.num_forgotten == 1
    told.change(prefixes(MAX_PENDING_CHANGES, 3 * MAX_PENDING_CHANGES))
    told.change(evicted=prefixes(0, MAX_PENDING_CHANGES))
    assert told.take().forgets_all
    told.take_all()
    assert told.known == set(told.cached)


@given(
    st.lists(st.tuples(st.sampled_from(["publish", "evict", "take"]), st.integers(0, 9)), max_size=80),
    st.integers(0, 10),
)
def test_who_is_told_everything_knows_the_cache(steps: list[tuple[str, int]], num_cached: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cache_feed, "MAX_CHANGES_IN_MESSAGE", 2)
        patched.setattr(cache_feed, "MAX_PENDING_CHANGES", 4)
        told = Told(prefixes(0, num_cached))
        for step, number in steps:
            if step == "take":
                told.take()
            elif step == "publish" and prefix(number) not in told.cached:
                told.change(published=(prefix(number),))
            elif step == "evict" and prefix(number) in told.cached:
                told.change(evicted=(prefix(number),))
        told.take_all()
        assert told.known == set(told.cached)
