"""Leases and the view of them: joining, leaving, dying, and a Redis that hangs, forgets or is full."""

import asyncio
import time
from collections.abc import Callable

import pytest

from kvrelay.embedded_valkey import EmbeddedValkey
from kvrelay.errors import UnavailableError, UnreadableStateError
from kvrelay.redis_connection import RedisConnection
from kvrelay.worker_registry import Member, MemberRole, MemberView, WorkerRegistry
from tests import redis_fixtures
from tests.redis_fixtures import eventually, stopped

server, connection = redis_fixtures.server, redis_fixtures.connection

LEASE_MS = 1500
"""A busy machine may be late by half of it."""
LOOK_MS = 20

PREFILL = Member("p1", MemberRole.PREFILL, "127.0.0.1:1", "model", "f" * 32)
DECODE = Member("d1", MemberRole.DECODE, "127.0.0.1:2", "model", "f" * 32)
GATEWAY = Member("g1", MemberRole.GATEWAY, "127.0.0.1:3")


@pytest.fixture
def registry(connection: RedisConnection) -> WorkerRegistry:
    return WorkerRegistry(connection, LEASE_MS)


async def until(view: MemberView, condition: Callable[[tuple[Member, ...]], bool]) -> None:
    async with asyncio.timeout(10):
        async for members in view.changes():
            if condition(members):
                return


async def die(registry: WorkerRegistry, member: Member) -> None:
    """Takes a lease and never renews nor withdraws it."""
    assert await registry._renew(member)


async def test_members_join_with_what_they_are_and_leave_at_once(registry: WorkerRegistry) -> None:
    async with registry.watch(LOOK_MS) as view:
        assert view.members() == ()
        async with registry.lease(PREFILL), registry.lease(DECODE), registry.lease(GATEWAY):
            await until(view, lambda members: set(members) == {PREFILL, DECODE, GATEWAY})
            assert view.members(MemberRole.DECODE) == (DECODE,)
            assert await registry.read_members() == (DECODE, GATEWAY, PREFILL)
        assert await registry.read_members() == ()
        started = time.monotonic()
        await until(view, lambda members: members == ())
        assert time.monotonic() - started < LEASE_MS / 1000


async def test_a_registry_that_is_broken_for_a_while_is_followed_again_when_it_is_mended(
    registry: WorkerRegistry, connection: RedisConnection
) -> None:
    async with registry.watch(LOOK_MS) as view:
        leases = "kvrelay:{registry}:leases"
        async with registry.lease(PREFILL):
            await until(view, lambda members: members == (PREFILL,))
            await connection.run(lambda client: client.set(leases, "not what it was"))
            with pytest.raises(UnreadableStateError):
                await registry.read_members()
            await asyncio.sleep(2 * LEASE_MS / 1000)  # for looks and renewals that fail
            await connection.run(lambda client: client.delete(leases))
            async with registry.lease(DECODE):
                await until(view, lambda members: set(members) == {PREFILL, DECODE})


async def test_a_lease_outlives_its_first_term(registry: WorkerRegistry) -> None:
    seen: list[tuple[Member, ...]] = []
    async with registry.lease(PREFILL), registry.watch(LOOK_MS, seen.append):
        await asyncio.sleep(3 * LEASE_MS / 1000)
    assert seen == [(PREFILL,)]


async def test_a_process_that_died_is_gone_after_its_lease(registry: WorkerRegistry) -> None:
    started = time.monotonic()
    await die(registry, PREFILL)
    async with registry.lease(DECODE), registry.watch(LOOK_MS) as view:
        assert view.members() == (DECODE, PREFILL)
        await until(view, lambda members: members == (DECODE,))
        assert LEASE_MS / 1000 * 0.9 < time.monotonic() - started < 3 * LEASE_MS / 1000


async def test_a_restarted_process_is_another_member(registry: WorkerRegistry) -> None:
    restarted = Member("p2", MemberRole.PREFILL, PREFILL.address, "model", "f" * 32)
    async with registry.watch(LOOK_MS) as view:
        async with registry.lease(PREFILL):
            await until(view, lambda members: members == (PREFILL,))
        async with registry.lease(restarted):
            await until(view, lambda members: members == (restarted,))


async def test_a_process_that_withdrew_may_come_back(registry: WorkerRegistry) -> None:
    async with registry.watch(LOOK_MS) as view:
        for _ in range(2):
            async with registry.lease(PREFILL):
                await until(view, lambda members: members == (PREFILL,))
            await until(view, lambda members: members == ())


async def test_changes_give_the_latest_and_the_callback_each(registry: WorkerRegistry) -> None:
    called: list[tuple[Member, ...]] = []
    async with registry.watch(LOOK_MS, called.append) as view:
        changes = view.changes()
        assert await anext(changes) == ()
        async with registry.lease(PREFILL):
            assert await asyncio.wait_for(anext(changes), 5) == (PREFILL,)
            async with registry.lease(DECODE):
                await until(view, lambda members: len(members) == 2)
            await until(view, lambda members: len(members) == 1)
            assert await asyncio.wait_for(anext(changes), 5) == (PREFILL,)
        assert called == [(PREFILL,), (DECODE, PREFILL), (PREFILL,)]


async def test_the_last_known_members_stay_while_redis_hangs_and_are_back_when_it_is(server: EmbeddedValkey) -> None:
    seen: list[tuple[Member, ...]] = []
    async with RedisConnection(server.url, timeout_ms=1000) as connection:
        registry = WorkerRegistry(connection, LEASE_MS)
        async with registry.lease(PREFILL), registry.watch(LOOK_MS, seen.append) as view:
            await until(view, lambda members: members == (PREFILL,))
            with stopped(server):
                await eventually(lambda: is_away(connection))
                await asyncio.sleep(3 * LEASE_MS / 1000)
                assert not connection.health.healthy
                assert view.members() == (PREFILL,)
            await eventually(lambda: has_lease(registry, PREFILL))
            assert view.members() == (PREFILL,)
    assert seen == [(PREFILL,)], "the member never seemed gone"


def test_a_member_that_ran_out_while_nobody_could_look_is_kept_until_it_may_have_renewed() -> None:
    seen: list[tuple[Member, ...]] = []
    view = MemberView(grace_s=3.0, on_change=seen.append)
    view.update((PREFILL, GATEWAY), frozenset(), now=0.0)
    view.update((), frozenset(), now=100.0)  # the first look since Redis is back
    assert view.members() == (GATEWAY, PREFILL)
    view.update((GATEWAY,), frozenset(), now=102.0)
    assert view.members() == (GATEWAY, PREFILL)
    view.update((GATEWAY,), frozenset(), now=103.0)
    assert view.members() == (GATEWAY,)
    view.update((), frozenset(), now=104.0)  # not missing for long, this time
    assert view.members() == (GATEWAY,)
    view.update((), frozenset({GATEWAY.instance_id}), now=104.1)
    assert view.members() == ()
    assert seen == [(GATEWAY, PREFILL), (GATEWAY,), ()]


async def is_away(connection: RedisConnection) -> bool:
    return not connection.health.healthy


async def has_lease(registry: WorkerRegistry, member: Member) -> bool:
    try:
        return member in await registry.read_members()
    except UnavailableError:
        return False


async def test_a_redis_that_forgot_everything_is_told_again_before_anyone_notices(
    registry: WorkerRegistry, connection: RedisConnection
) -> None:
    seen: list[tuple[Member, ...]] = []
    async with registry.lease(PREFILL), registry.watch(LOOK_MS, seen.append):
        await connection.run(lambda client: client.flushall())
        assert await registry.read_members() == ()
        await eventually(lambda: has_lease(registry, PREFILL), timeout_s=LEASE_MS / 1000)
        await asyncio.sleep(3 * LOOK_MS / 1000)
    assert seen == [(PREFILL,)]


async def test_entering_without_redis_works_and_the_lease_follows(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 200) as connection:
        registry = WorkerRegistry(connection, 60_000)
        with stopped(server):
            lease, watch = registry.lease(PREFILL), registry.watch(LOOK_MS)
            async with asyncio.timeout(5):
                await lease.__aenter__()
                view = await watch.__aenter__()
            assert not await view.wait_until_looked(timeout_ms=50)
        assert await view.wait_until_looked(timeout_ms=5000)
        await until(view, lambda members: members == (PREFILL,))
        await watch.__aexit__(None, None, None)
        await lease.__aexit__(None, None, None)
        assert await registry.read_members() == ()


async def test_leaving_without_redis_does_not_fail(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 200) as connection:
        async with WorkerRegistry(connection, LEASE_MS).lease(PREFILL):
            pass
        with stopped(server):
            async with asyncio.timeout(5), WorkerRegistry(connection, LEASE_MS).lease(PREFILL):
                pass


async def test_leases_are_granted_by_a_redis_without_memory(registry: WorkerRegistry, connection: RedisConnection) -> None:
    async with registry.lease(PREFILL):
        await connection.run(lambda client: client.config_set("maxmemory", "1"))
        async with registry.lease(DECODE):
            assert await registry.read_members() == (DECODE, PREFILL)


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_jump_of_this_process_clock_changes_no_lease(
    registry: WorkerRegistry, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    seen: list[tuple[Member, ...]] = []
    wall_clock = time.time
    async with registry.lease(PREFILL), registry.watch(LOOK_MS, seen.append):
        monkeypatch.setattr(time, "time", lambda: wall_clock() + hours * 3600)
        await asyncio.sleep(2 * LEASE_MS / 1000)
    assert seen == [(PREFILL,)]


async def test_what_another_version_wrote_is_skipped(registry: WorkerRegistry, connection: RedisConnection) -> None:
    for instance_id, payload in [("a", "not json"), ("b", '{"role": "encode"}'), ("c", "[]"), ("d", '{"role": "decode"}')]:
        await connection.run_script(
            "lease",
            ["kvrelay:{registry}:leases", "kvrelay:{registry}:members", "kvrelay:{registry}:withdrawn"],
            (instance_id, payload, 60_000),
        )
    async with registry.lease(PREFILL):
        assert await registry.read_members() == (PREFILL,)


async def test_every_key_has_a_time_to_live(registry: WorkerRegistry, connection: RedisConnection) -> None:
    async with registry.lease(PREFILL), registry.lease(DECODE):
        pass
    await die(registry, PREFILL)
    keys = await connection.run(lambda client: client.keys("*"))
    assert len(keys) == 3
    for key in keys:
        assert await connection.run(lambda client, key=key: client.pttl(key)) > 0  # type: ignore[misc]
