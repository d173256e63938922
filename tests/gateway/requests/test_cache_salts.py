"""Salts of prefix caches: one for each tenant, the same on all gateways, and no name in them."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from gateway.requests import cache_salts
from gateway.requests.cache_salts import CacheSalts
from kvrelay.config.security_settings import SecuritySettings
from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.state.state_store import StateStore
from kvrelay.state.store_health import StoreHealth


class OneSecret:
    """The part of a store that salts need."""

    def __init__(self) -> None:
        self.health = StoreHealth()
        self.secret: bytes | None = None
        self.num_calls = 0
        self.called = asyncio.Event()
        self.num_failures = 0

    async def share_cache_secret(self, secret: bytes) -> bytes:
        self.num_calls += 1
        self.called.set()
        if self.num_failures:
            self.num_failures -= 1
            raise UnavailableError("away")
        self.secret = self.secret or secret
        return self.secret


def as_store(store: OneSecret) -> StateStore:
    return cast(StateStore, store)


def test_a_salt_is_the_tenants_alone_and_names_nobody() -> None:
    salts = CacheSalts(b"s" * 32)
    tenants = ["", "bank", "bank2", "x" * 128, "ü"]
    assert len({salts.of(tenant) for tenant in tenants}) == len(tenants)
    assert all(len(salts.of(tenant)) == 32 and salts.of(tenant).isalnum() for tenant in tenants)
    assert salts.of("bank") == CacheSalts(b"s" * 32).of("bank")
    assert salts.of("bank") != CacheSalts(b"t" * 32).of("bank")
    assert CacheSalts().of("bank") != CacheSalts().of("bank")


def test_a_salt_is_computed_once_and_the_number_of_kept_ones_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_salts, "MAX_CACHED_SALTS", 3)
    salts = CacheSalts(b"s" * 32)
    assert salts.of("a") is salts.of("a")
    for number in range(10):
        salts.of(str(number))
    assert len(salts._salts) <= 3
    assert salts.of("a") == CacheSalts(b"s" * 32).of("a")


async def test_gateways_use_the_secret_of_the_first() -> None:
    store, gateways = OneSecret(), [CacheSalts() for _ in range(3)]
    before = [each.of("bank") for each in gateways]
    for each in gateways:
        await each.share(as_store(store))
    assert [each.of("bank") for each in gateways] == [before[0]] * 3


async def test_a_secret_from_a_file_is_never_shared() -> None:
    store = OneSecret()
    salts = CacheSalts(b"s" * 32)
    await salts.share(as_store(store))
    await salts.keep_shared(as_store(store))
    assert store.num_calls == 0


async def test_a_lost_secret_is_given_again_and_an_outage_is_outlived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_salts, "SHARE_INTERVAL_S", 0.001)
    store, salts = OneSecret(), CacheSalts()
    store.num_failures = 2
    keeping = asyncio.create_task(salts.keep_shared(as_store(store)))
    try:
        async with asyncio.timeout(30):
            while store.secret is None:
                store.called.clear()
                await store.called.wait()
            first, store.secret = store.secret, None
            while store.secret is None:
                store.called.clear()
                await store.called.wait()
        assert store.secret == first
    finally:
        keeping.cancel()
        await asyncio.wait([keeping])


def test_any_length_of_a_secret_counts_as_a_whole() -> None:
    assert CacheSalts(b"s" * 200).of("bank") != CacheSalts(b"s" * 199 + b"t").of("bank")


def test_a_file_gives_the_secret_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"0123456789abcdef\n")
    settings = SecuritySettings(cache_secret_file=str(tmp_path / "secret"))
    assert settings.cache_secret() == b"0123456789abcdef"
    assert SecuritySettings().cache_secret() is None


@pytest.mark.parametrize("content", [None, b"", b"short\n"])
def test_a_missing_or_short_secret_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError, match="cache_secret_file"):
        SecuritySettings(cache_secret_file=str(tmp_path / "secret")).cache_secret()
