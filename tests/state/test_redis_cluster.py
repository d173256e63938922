"""A Redis Cluster as people have it: wrong urls, users, moved keys, dead and promoted nodes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection, check_redis_at
from kvrelay.state.redis_faults import RedisFault
from kvrelay.state.state_store import StateStore, request_key
from tests.support import redis_deployments
from tests.support.redis_deployments import Deployment
from tests.support.redis_fixtures import admin_of, eventually, make_record

TIMEOUT_MS = 5000
NODE_TIMEOUT_MS = 1000
RIGHTS = ("+@read", "+@write", "+@scripting", "+@connection", "+info", "+time")
"""As docs/guides/operate.md has them, and +cluster|slots."""


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with redis_deployments.cluster(tmp_path) as started:
        yield started


@asynccontextmanager
async def replicated(folder: Path) -> AsyncIterator[Deployment]:
    """A replica of each of three primaries, promoted within seconds."""
    async with redis_deployments.cluster(folder, num_replicas=3, node_timeout_ms=NODE_TIMEOUT_MS) as started:
        yield started


def request_ids(node: int) -> list[str]:
    """Ids whose keys are on one of three primaries."""
    first, end = (redis_deployments.NUM_SLOTS * each // 3 for each in (node, node + 1))
    return [f"r{number}" for number in range(60) if first <= key_slot(request_key(f"r{number}").encode()) < end][:5]


def first_host(cluster: Deployment) -> str:
    """The url of one node alone."""
    return cluster.url.split(",")[0]


async def test_a_node_by_a_url_without_a_cluster_is_refused_with_the_url_to_write(cluster: Deployment) -> None:
    plain = first_host(cluster).replace("redis+cluster://", "redis://")
    with pytest.raises(ConfigError, match=r"write redis\+cluster://HOST:PORT") as refusal:
        await check_redis_at(plain)
    assert cluster.servers[0].password not in refusal.value.message


async def test_a_gateway_does_not_start_with_the_url_of_a_node(cluster: Deployment) -> None:
    plain = first_host(cluster).replace("redis+cluster://", "redis://")
    command = [sys.executable, "-m", "kvrelay.cli", "serve", "gateway", "--port", "0", "--redis-url", plain]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "write redis+cluster://HOST:PORT" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr


async def test_a_server_that_is_no_cluster_is_refused_with_the_url_to_write() -> None:
    async with EmbeddedValkey(on_tcp=True) as server:
        with pytest.raises(ConfigError, match="write redis:// instead"):
            await check_redis_at(f"redis+cluster://:{server.password}@127.0.0.1:{server.port}")
        with pytest.raises(ConfigError, match="wants a password"):
            await check_redis_at(f"redis+cluster://127.0.0.1:{server.port}")


async def test_a_cluster_that_is_away_is_no_reason_not_to_start() -> None:
    async with RedisConnection("redis+cluster://127.0.0.1:1,127.0.0.1:2", TIMEOUT_MS) as connection:
        await connection.check()
        with pytest.raises(UnavailableError, match="connection refused"):
            await connection.ping()
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").get("r1")
        assert "connection refused" in (connection.health.problem or "")


async def test_one_reachable_host_of_several_is_enough(cluster: Deployment) -> None:
    url = first_host(cluster).replace("@", "@127.0.0.1:1,") + ",127.0.0.1:2"
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        for number in range(20):
            assert await StateStore(connection, "g1").create(make_record(f"r{number}"))


@pytest.mark.parametrize("may_ask", [True, False])
async def test_a_user_needs_the_right_to_ask_for_the_nodes(cluster: Deployment, may_ask: bool) -> None:
    for server in cluster.servers:
        async with admin_of(server) as client:
            rights = (*RIGHTS, *(("+cluster|slots",) if may_ask else ()))
            await client.execute_command("ACL", "SETUSER", "kv", "on", ">pw", "~kvrelay:*", *rights)
    url = cluster.url.replace(f":{cluster.servers[0].password}@", "kv:pw@")
    if not may_ask:
        with pytest.raises(ConfigError, match=r"in a Redis Cluster \+cluster\|slots \(it lacks the command CLUSTER"):
            await check_redis_at(url)
        return
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        store = StateStore(connection, "g1")
        for number in range(20):
            assert await store.create(make_record(f"r{number}"))
            assert await store.get(f"r{number}") is not None
        assert len((await store.list_requests(50)).requests) == 20


async def test_a_slot_that_no_node_serves_is_said_and_nothing_is_served_meanwhile(cluster: Deployment) -> None:
    lost = key_slot(b"r1")
    async with RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        assert await store.create(make_record())
        for server in cluster.servers:
            async with admin_of(server) as client:
                await client.execute_command("CLUSTER", "DELSLOTS", lost)
        with pytest.raises(UnavailableError):
            await store.create(make_record("r2" if key_slot(b"r2") == lost else "r1"))
        await eventually(partial(_has_problem, connection, "slots that no node serves"))


async def _has_problem(connection: RedisConnection, said: str) -> bool:
    return said in (connection.health.problem or "")


async def test_a_cluster_without_one_of_its_primaries_counts_as_away(
    cluster: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others answer, and would close the breaker again and again."""
    async with RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        looks: list[RedisFault] = []
        assert await store.create(make_record(request_ids(1)[0]))
        monkeypatch.setattr(connection.health, "record_failed_probe", looks.append)
        os.kill(cluster.servers[1].pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await store.get(request_ids(1)[0])

        async def has_looked() -> bool:
            return len(looks) >= 3

        await eventually(has_looked)
        assert not connection.health.healthy
        assert {look.sentence for look in looks} == {
            "nothing listens at the address of --redis-url (connection refused)"
        }


async def test_slots_that_move_are_followed_without_a_failed_operation(cluster: Deployment) -> None:
    moved = request_ids(0)
    slots = {key_slot(request_key(request_id).encode()) for request_id in moved}
    async with RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        assert await store.get(moved[0]) is None  # it knows the nodes
        async with admin_of(cluster.servers[1]) as receiver:
            target = await receiver.execute_command("CLUSTER", "MYID")
        for server in cluster.servers:
            async with admin_of(server) as client:
                for slot in slots:
                    await client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target)
        for request_id in moved:
            assert await store.create(make_record(request_id))
            assert await store.get(request_id) is not None
        assert connection.health.healthy
    async with admin_of(cluster.servers[1]) as receiver:
        assert await receiver.exists(*[request_key(moved[0])]) == 1


async def test_a_follower_waits_on_the_node_that_has_the_log(cluster: Deployment) -> None:
    async with RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        for node in range(3):
            request_id = request_ids(node)[0]
            await store.create(make_record(request_id))
            following = asyncio.create_task(store.read_frames(request_id, 0, 10, wait_ms=30_000))
            await eventually(partial(_is_blocked, cluster.servers[node]))
            await store.append_frames(request_id, 1, 0, [b"frame"])
            assert (await following)[0] == [b"frame"]


async def _is_blocked(server: EmbeddedValkey) -> bool:
    async with admin_of(server) as client:
        return bool((await client.info("clients"))["blocked_clients"])


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hanging"])
async def test_a_promoted_replica_serves_the_keys_of_a_lost_primary(
    tmp_path: Path, signal_number: signal.Signals
) -> None:
    async with replicated(tmp_path) as cluster, RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        ids = [request_id for node in range(3) for request_id in request_ids(node)]
        for request_id in ids:
            assert await store.create(make_record(request_id))
        await _is_replicated(cluster, ids)
        os.kill(cluster.servers[0].pid, signal_number)
        try:
            await eventually(partial(_are_served, store, ids))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cluster.servers[0].pid, signal.SIGCONT)
        assert await StateStore(connection, "g2").take_over(request_ids(0)[0], "g1", 1) is not None
        assert connection.health.healthy


async def _is_replicated(cluster: Deployment, ids: list[str]) -> None:
    """WAIT asks of one connection's writes only: here the replicas count their keys."""

    async def has_all() -> bool:
        counts = []
        for server in cluster.servers:
            async with admin_of(server) as client:
                counts.append(await client.dbsize())
        return counts[:3] == counts[3:] and sum(counts[:3]) >= 2 * len(ids)

    await eventually(has_all)


async def _are_served(store: StateStore, ids: list[str]) -> bool:
    try:
        records = [await store.get(request_id) for request_id in ids]
    except UnavailableError:
        return False
    assert all(records), "a replica has lost what it had"
    return True


async def test_a_failover_by_hand_loses_nothing_and_is_over_in_a_moment(tmp_path: Path) -> None:
    async with replicated(tmp_path) as cluster, RedisConnection(cluster.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        ids = request_ids(0)
        for request_id in ids:
            assert await store.create(make_record(request_id))
        async with admin_of(cluster.servers[3]) as replica:
            await replica.execute_command("CLUSTER", "FAILOVER")

            async def is_primary() -> bool:
                role: list[Any] = await replica.execute_command("ROLE")
                return bool(role[0] == b"master")

            await eventually(is_primary)
        await eventually(partial(_are_served, store, ids))
        assert await store.append_frames(ids[0], 1, 0, [b"frame"]) == 1
        async with admin_of(cluster.servers[3]) as replica:
            assert await replica.exists(request_key(ids[0])) == 1
