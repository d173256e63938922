"""Results that are made once for all who ask, kept and dropped; failures and callers that leave."""

import asyncio

import pytest

from kvrelay.runtime.single_flight_cache import SingleFlightCache


class Maker:
    """Makes results when it is let."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.has_begun, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None

    async def make(self, key: str) -> str:
        self.made.append(key)
        self.has_begun.set()
        await self.may_go_on.wait()
        if self.failure is not None:
            raise self.failure
        return key.upper()

    def cache(self, max_kept: int = 2) -> SingleFlightCache[str, str]:
        return SingleFlightCache(self.make, max_kept, "result")


async def test_all_who_ask_share_one_making_and_its_result_is_kept() -> None:
    maker = Maker()
    cache = maker.cache()
    assert await asyncio.gather(*(cache.get("a") for _ in range(5))) == ["A"] * 5
    assert await cache.get("a") == cache.kept("a") == "A"
    assert maker.made == ["a"]
    assert (cache.num_kept, cache.num_running, "a" in cache, "b" in cache) == (1, 0, True, False)


async def test_the_least_recently_used_is_dropped_first() -> None:
    maker = Maker()
    cache = maker.cache(max_kept=2)
    for key in ("a", "b", "a", "c"):
        await cache.get(key)
    assert [cache.kept(key) for key in "abc"] == ["A", None, "C"]


async def test_a_failure_goes_to_all_who_wait_and_is_not_kept() -> None:
    maker = Maker()
    cache = maker.cache()
    maker.failure = ValueError("no")
    results = await asyncio.gather(*(cache.get("a") for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 2
    maker.failure = None
    assert await cache.get("a") == "A"
    assert maker.made == ["a", "a"]


async def test_who_leaves_takes_nothing_from_others() -> None:
    maker = Maker()
    cache = maker.cache()
    maker.may_go_on.clear()
    leaving, staying = (asyncio.create_task(cache.get("a")) for _ in range(2))
    await maker.has_begun.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert cache.num_running == 1
    maker.may_go_on.set()
    assert await staying == "A"
