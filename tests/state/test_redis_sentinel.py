"""Sentinels as people have them: wrong urls and passwords, some away, a primary that ends."""

import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from kvrelay.config.settings import ServerSettings
from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection, check_redis_at
from kvrelay.state.state_store import StateStore, request_key
from tests.support import sentinels
from tests.support.redis_fixtures import admin_of, eventually, make_record
from tests.support.sentinels import SERVICE, WatchedDeployment

TIMEOUT_MS = 5000
DOWN_AFTER_MS = 1000
WAIT_S = 60.0


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[WatchedDeployment]:
    async with sentinels.watched(tmp_path) as started:
        yield started


@pytest.fixture
async def hasty(tmp_path: Path) -> AsyncIterator[WatchedDeployment]:
    """Sentinels that promote a replica within seconds."""
    async with sentinels.watched(tmp_path, down_after_ms=DOWN_AFTER_MS) as started:
        yield started


async def test_a_service_that_no_sentinel_watches_is_refused_with_those_that_they_do(
    watched: WatchedDeployment,
) -> None:
    with pytest.raises(ConfigError, match=f"by the name in it: they watch {SERVICE}") as refusal:
        await check_redis_at(watched.url.replace(SERVICE, "other"))
    assert watched.servers[0].password not in refusal.value.message


@pytest.mark.parametrize("password", ["", "?sentinel_password=wrong"])
async def test_a_wrong_password_of_the_sentinels_is_said(watched: WatchedDeployment, password: str) -> None:
    with pytest.raises(ConfigError, match="--sentinel-pass-file"):
        await check_redis_at(watched.url.split("?")[0] + password)


async def test_a_user_of_the_sentinels_needs_the_right_to_ask_for_the_primary(watched: WatchedDeployment) -> None:
    url = f"{watched.url.split('?')[0]}?sentinel_username=watcher&sentinel_password=pw"
    for sentinel in watched.sentinels:
        async with sentinel.client() as client:
            await client.execute_command("ACL", "SETUSER", "watcher", "on", ">pw", "+@connection")
    with pytest.raises(ConfigError, match=r"\+@connection \+sentinel\|masters"):
        await check_redis_at(url)
    for sentinel in watched.sentinels:
        async with sentinel.client() as client:
            await client.execute_command("ACL", "SETUSER", "watcher", "+sentinel|masters")
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        assert await StateStore(connection, "g1").create(make_record())


async def test_a_password_of_the_primary_that_is_wrong_is_said(watched: WatchedDeployment) -> None:
    with pytest.raises(ConfigError, match="refuses the user or the password of --redis-url"):
        await check_redis_at(watched.url.replace(f":{watched.servers[0].password}@", ":wrong@"))


async def test_servers_given_for_sentinels_and_sentinels_given_for_a_server_are_told_apart(
    watched: WatchedDeployment,
) -> None:
    server, sentinel = watched.servers[0], watched.sentinels[0]
    with pytest.raises(ConfigError, match="no Sentinel: write redis://"):
        await check_redis_at(
            f"redis+sentinel://:{server.password}@127.0.0.1:{server.port}/{SERVICE}?sentinel_password={server.password}"
        )
    with pytest.raises(ConfigError, match=r"is a Redis Sentinel: write redis\+sentinel://"):
        await check_redis_at(f"redis://:{sentinel.password}@127.0.0.1:{sentinel.port}/0")


async def test_password_files_of_both_complete_the_url(watched: WatchedDeployment, tmp_path: Path) -> None:
    files = {
        "redis_password_file": watched.servers[0].password,
        "sentinel_pass_file": watched.sentinels[0].password,
    }
    for name, password in files.items():
        (tmp_path / name).write_text(password)
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in watched.sentinels)
    settings = ServerSettings.model_validate(
        {"redis_url": f"redis+sentinel://{hosts}/{SERVICE}/3", **{name: str(tmp_path / name) for name in files}}
    )
    async with RedisConnection(settings.required_redis_url(), TIMEOUT_MS) as connection:
        await connection.check()
        assert await StateStore(connection, "g1").create(make_record())
    async with admin_of(watched.servers[0]) as client:
        assert "db3" in await client.info("keyspace")


async def test_sentinels_that_are_away_are_no_reason_not_to_start() -> None:
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:2/{SERVICE}"
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        with pytest.raises(UnavailableError, match="knows a primary that is up"):
            await connection.ping()
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").get("r1")
        await eventually(partial(_has_problem, connection, "connection refused"))


async def _has_problem(connection: RedisConnection, said: str) -> bool:
    return said in (connection.health.problem or "")


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
async def test_one_sentinel_that_answers_is_enough(watched: WatchedDeployment, signal_number: signal.Signals) -> None:
    for sentinel in watched.sentinels[:2]:
        os.kill(sentinel.pid, signal_number)
    try:
        async with RedisConnection(watched.url, TIMEOUT_MS) as connection:
            await connection.check()
            # Each hanging one may cost half of an operation's time, until another has answered.
            await eventually(partial(_is_created, StateStore(connection, "g1")))
    finally:
        for sentinel in watched.sentinels[:2]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(sentinel.pid, signal.SIGCONT)


async def _is_created(store: StateStore, request_id: str = "r1") -> bool:
    try:
        return await store.create(make_record(request_id))
    except UnavailableError:
        return False


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
async def test_a_promoted_replica_serves_what_a_lost_primary_had(
    hasty: WatchedDeployment, signal_number: signal.Signals
) -> None:
    async with RedisConnection(hasty.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        for number in range(5):
            assert await store.create(make_record(f"r{number}"))
        await eventually(partial(_has_keys, hasty.servers[1], await _num_keys(hasty.servers[0])))
        os.kill(hasty.servers[0].pid, signal_number)
        try:
            await eventually(partial(_is_read, store, "r3"), WAIT_S)
            assert (await hasty.address_of_primary())[1] == hasty.servers[1].port
            assert await store.append_frames("r3", 1, 0, [b"frame"]) == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(hasty.servers[0].pid, signal.SIGCONT)
        # A primary that was only slow is made a replica, and is not written to.
        assert await store.append_frames("r3", 1, 1, [b"frame"]) == 2
        async with admin_of(hasty.servers[1]) as client:
            assert await client.xlen("kvrelay:{r3}:log") == 2


async def _num_keys(server: EmbeddedValkey) -> int:
    async with admin_of(server) as client:
        return int(await client.dbsize())


async def _has_keys(server: EmbeddedValkey, num_keys: int) -> bool:
    return await _num_keys(server) == num_keys


async def _is_read(store: StateStore, request_id: str) -> bool:
    try:
        record = await store.get(request_id)
    except UnavailableError:
        return False
    assert record is not None, "the replica has lost what it had"
    return True


async def test_after_a_failover_by_hand_the_primary_before_is_left_though_it_takes_writes(tmp_path: Path) -> None:
    """Sentinels make it a replica after a while; here they never can."""
    stubborn = ("--rename-command", "SLAVEOF", "")
    async with (
        sentinels.watched(tmp_path, primary_options=stubborn) as watched,
        RedisConnection(watched.url, TIMEOUT_MS) as connection,
    ):
        store = StateStore(connection, "g1")
        assert await store.create(make_record("r0"))
        await eventually(partial(_has_keys, watched.servers[1], await _num_keys(watched.servers[0])))
        async with watched.sentinels[0].client() as client:
            await eventually(partial(sentinels.fails_over, client), WAIT_S)
        numbers = itertools.count(1)

        async def is_written_to_the_next() -> bool:
            request_id = f"r{next(numbers)}"
            async with admin_of(watched.servers[1]) as server:
                return await _is_created(store, request_id) and bool(await server.exists(request_key(request_id)))

        await eventually(is_written_to_the_next, WAIT_S)
        async with admin_of(watched.servers[0]) as server:
            assert (await server.execute_command("ROLE"))[0] == b"master"
        assert await store.get("r0") is not None
        assert connection.health.healthy
