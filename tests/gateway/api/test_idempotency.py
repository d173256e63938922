"""Idempotency keys of two gateways while their shared store is away."""

import asyncio
from typing import cast

import pytest

from gateway.api import idempotency
from gateway.api.idempotency import IdempotencyKeys
from gateway.lifecycle.generation_request import GenerationRequest
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import UnavailableError
from kvrelay.state.state_store import StateStore
from kvrelay.state.store_health import StoreHealth
from kvrelay.v1 import inference_pb2


class SmallStore:
    """The part of a store that keys need, shared by all gateways."""

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}


class OneSide:
    """The store as one gateway sees it."""

    def __init__(self, store: SmallStore) -> None:
        self.health = StoreHealth()
        self.num_claims = 0
        self.answers_at_once = False
        self._store = store

    async def claim_idempotency_key(self, tenant: str, key: str, digest: str, request_id: str, ttl_ms: int) -> str:
        self.num_claims += 1
        self.health.check()
        if not self.answers_at_once:
            await asyncio.sleep(0)
        return self._store.owners.setdefault(key, request_id)


async def begin(keys: IdempotencyKeys, request_id: str, key: str = "key") -> str:
    """Returns the id of the key's request, started here or elsewhere."""
    async with keys.lock(inference_pb2.GenerateRequest(idempotency_key=key)) as claim:
        if claim.request_id is None:
            await claim.make(GenerationRequest(request_id, "", "", (), SamplingParams(), "", 0.0, 1.0))
    assert claim.request_id is not None
    return claim.request_id


async def test_a_short_outage_of_the_store_is_waited_out() -> None:
    store = SmallStore()
    here, there = OneSide(store), OneSide(store)
    here.health.open(TimeoutError())
    first = asyncio.create_task(begin(IdempotencyKeys(cast(StateStore, here), 1000), "first"))
    while not here.num_claims:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert await begin(IdempotencyKeys(cast(StateStore, there), 1000), "second") == "second"
    here.health.close()
    assert await first == "second"


async def test_a_key_waits_for_the_store_while_another_key_is_claimed() -> None:
    here = OneSide(SmallStore())
    keys = IdempotencyKeys(cast(StateStore, here), 1000)
    here.health.open(TimeoutError())
    waiting = asyncio.create_task(begin(keys, "first", "a"))
    while not here.num_claims:  # noqa: ASYNC110
        await asyncio.sleep(0)
    here.health.close()
    here.answers_at_once = True
    # before the first claim learns that the store is back
    assert await begin(keys, "second", "b") == "second"
    assert await waiting == "first"
    assert here.num_claims == 3


async def test_a_long_outage_of_the_store_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "LONGEST_WAIT_FOR_STORE_S", 0.05)
    here = OneSide(SmallStore())
    here.health.open(UnavailableError("away"))
    keys = IdempotencyKeys(cast(StateStore, here), 1000)
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
