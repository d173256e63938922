"""Keys of two gateways while the store that both ask is away."""

import asyncio
from typing import Any, cast

import pytest

from gateway import idempotency
from gateway.idempotency import IdempotencyKeys, Joined
from kvrelay.errors import UnavailableError
from kvrelay.redis_connection import StoreHealth
from kvrelay.state_store import IdempotencyClaim, StateStore


class SmallStore:
    """What of a store keys need, shared by all."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}


class OneSide:
    """The store as one gateway sees it, away or not."""

    def __init__(self, store: SmallStore) -> None:
        self.health = StoreHealth()
        self.num_claims = 0
        self.answers_at_once = False
        self._store = store

    async def claim_idempotency_key(self, tenant: str, key: str, digest: str, request_id: str, ttl_ms: int) -> Any:
        self.num_claims += 1
        self.health.check()
        if not self.answers_at_once:
            await asyncio.sleep(0)
        owner = self._store.owners.setdefault(key, request_id)
        return IdempotencyClaim(owner, owner == request_id)


async def begin(keys: IdempotencyKeys, request_id: str, key: str = "key") -> str:
    """The id of the request that the key stands for, begun here or not."""

    async def prepare() -> str:
        return request_id

    joined = await keys.begin_or_join("", key, "body", 1000, prepare)
    if joined is None:
        keys.settle("", key, request_id)
        return request_id
    assert isinstance(joined, Joined)
    return joined.request_id


async def test_a_store_that_is_away_for_a_moment_is_waited_for() -> None:
    store = SmallStore()
    here, there = OneSide(store), OneSide(store)
    here.health.open(TimeoutError())
    first = asyncio.create_task(begin(IdempotencyKeys(cast(StateStore, here)), "first"))
    while not here.num_claims:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await begin(IdempotencyKeys(cast(StateStore, there)), "second") == "second"
    here.health.close()
    assert await first == "second"


async def test_a_key_waits_for_the_store_while_another_key_is_claimed() -> None:
    here = OneSide(SmallStore())
    keys = IdempotencyKeys(cast(StateStore, here))
    here.health.open(TimeoutError())
    waiting = asyncio.create_task(begin(keys, "first", "a"))
    while not here.num_claims:  # noqa: ASYNC110
        await asyncio.sleep(0)
    here.health.close()
    here.answers_at_once = True
    assert await begin(keys, "second", "b") == "second"  # before the first is told that the store is back
    assert await waiting == "first"
    assert here.num_claims == 3


async def test_a_store_that_stays_away_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "LONGEST_WAIT_FOR_STORE_S", 0.05)
    here = OneSide(SmallStore())
    here.health.open(UnavailableError("away"))
    keys = IdempotencyKeys(cast(StateStore, here))
    assert await begin(keys, "first", "one") == "first"
    assert here.num_claims == 1
    waited = asyncio.create_task(begin(keys, "second", "two"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert waited.done(), "nobody waits any more"
    assert await waited == "second"
    assert await begin(keys, "third", "two") == "second", "within this gateway keys hold"
    here.health.close()
    assert await begin(keys, "fourth", "four") == "fourth"
