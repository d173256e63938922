"""Leases and the view of them: joining, leaving, dying, and a Redis that hangs, forgets or is full."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import UnavailableError, UnreadableStateError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry, MemberView
from kvrelay.state.redis_connection import RedisConnection
from tests.support import redis_fixtures, state_contract
from tests.support.redis_deployments import Deployment
from tests.support.redis_fixtures import eventually, stopped

server = redis_fixtures.server
deployment, connection = state_contract.deployment, state_contract.connection

LEASE_MS = 1500
"""Where a test waits until a lease has run out."""
LONG_LEASE_MS = 6000
"""Where one must not: a busy machine may be late with a renewal by more than half of it."""
ENDLESS_LEASE_MS = 600_000
"""Longer than any test waits."""
LOOK_MS = 20

PREFILL = Member("p1", MemberRole.PREFILL, "127.0.0.1:1", "model", "f" * 32)
DECODE = Member("d1", MemberRole.DECODE, "127.0.0.1:2", "model", "f" * 32)
GATEWAY = Member("g1", MemberRole.GATEWAY, "127.0.0.1:3")


@pytest.fixture
def registry(connection: RedisConnection) -> MemberRegistry:
    return MemberRegistry(connection, LEASE_MS)


@pytest.fixture
def long_registry(connection: RedisConnection) -> MemberRegistry:
    return MemberRegistry(connection, LONG_LEASE_MS)


async def until(view: MemberView, condition: Callable[[tuple[Member, ...]], bool]) -> None:
    async with asyncio.timeout(30):
        async for members in view.changes():
            if condition(members):
                return


async def die(registry: MemberRegistry, member: Member) -> None:
    """Takes a lease and never renews nor withdraws it."""
    assert await registry._renew(member)


async def renewed(connection: RedisConnection, member: Member) -> None:
    """Waits until a lease has been renewed once more."""

    async def end_ms() -> float:
        leases = "kvrelay:{registry}:leases"
        score = await connection.run(lambda client: client.zscore(leases, member.instance_id))
        return score or 0.0

    first_ms = await end_ms()

    async def ends_later() -> bool:
        return await end_ms() > first_ms

    await eventually(ends_later)


async def test_members_join_with_what_they_are_and_leave_at_once(connection: RedisConnection) -> None:
    registry = MemberRegistry(connection, ENDLESS_LEASE_MS)
    async with registry.watch(LOOK_MS) as view:
        assert view.members() == ()
        async with registry.lease(PREFILL), registry.lease(DECODE), registry.lease(GATEWAY):
            await until(view, lambda members: set(members) == {PREFILL, DECODE, GATEWAY})
            assert view.members(MemberRole.DECODE) == (DECODE,)
            assert await registry.read_members() == (DECODE, GATEWAY, PREFILL)
        assert await registry.read_members() == ()
        await until(view, lambda members: members == ())


async def test_a_registry_that_is_broken_for_a_while_is_followed_again_when_it_is_mended(
    registry: MemberRegistry, connection: RedisConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"look": 0, "_renew": 0}

    def count(name: str) -> None:
        method = getattr(registry, name)

        async def counted(*arguments: Any) -> Any:
            result = await method(*arguments)
            failed[name] += 1
            return result

        monkeypatch.setattr(registry, name, counted)

    async def both_failed_again() -> bool:
        return min(failed.values()) >= 2

    async with registry.watch(LOOK_MS) as view:
        leases = "kvrelay:{registry}:leases"
        async with registry.lease(PREFILL):
            await until(view, lambda members: members == (PREFILL,))
            await connection.run(lambda client: client.set(leases, "not what it was"))
            with pytest.raises(UnreadableStateError):
                await registry.read_members()
            count("look")
            count("_renew")
            await eventually(both_failed_again)
            await connection.run(lambda client: client.delete(leases))
            async with registry.lease(DECODE):
                await until(view, lambda members: set(members) == {PREFILL, DECODE})


async def test_a_lease_outlives_its_first_term(long_registry: MemberRegistry, connection: RedisConnection) -> None:
    seen: list[tuple[Member, ...]] = []
    async with long_registry.lease(PREFILL), long_registry.watch(LOOK_MS, seen.append):
        await renewed(connection, PREFILL)
    assert seen == [(PREFILL,)]


async def test_a_process_that_died_is_gone_after_its_lease(registry: MemberRegistry) -> None:
    started = time.monotonic()
    await die(registry, PREFILL)
    async with registry.lease(DECODE), registry.watch(LOOK_MS) as view:
        assert view.members() == (DECODE, PREFILL)
        await until(view, lambda members: members == (DECODE,))
        assert time.monotonic() - started > LEASE_MS / 1000 * 0.9


async def test_a_restarted_process_is_another_member(registry: MemberRegistry) -> None:
    restarted = Member("p2", MemberRole.PREFILL, PREFILL.address, "model", "f" * 32)
    async with registry.watch(LOOK_MS) as view:
        async with registry.lease(PREFILL):
            await until(view, lambda members: members == (PREFILL,))
        async with registry.lease(restarted):
            await until(view, lambda members: members == (restarted,))


async def test_a_process_that_withdrew_may_come_back(registry: MemberRegistry) -> None:
    async with registry.watch(LOOK_MS) as view:
        for _ in range(2):
            async with registry.lease(PREFILL):
                await until(view, lambda members: members == (PREFILL,))
            await until(view, lambda members: members == ())


async def test_changes_give_the_latest_and_the_callback_each(registry: MemberRegistry) -> None:
    called: list[tuple[Member, ...]] = []
    async with registry.watch(LOOK_MS, called.append) as view:
        changes = view.changes()
        assert await anext(changes) == ()
        async with registry.lease(PREFILL):
            assert await asyncio.wait_for(anext(changes), 30) == (PREFILL,)
            async with registry.lease(DECODE):
                await until(view, lambda members: len(members) == 2)
            await until(view, lambda members: len(members) == 1)
            assert await asyncio.wait_for(anext(changes), 30) == (PREFILL,)
        assert called == [(PREFILL,), (DECODE, PREFILL), (PREFILL,)]


async def test_the_last_known_members_stay_while_redis_hangs_and_are_back_when_it_is(server: EmbeddedValkey) -> None:
    seen: list[tuple[Member, ...]] = []
    async with RedisConnection(server.url, timeout_ms=1000) as connection:
        registry = MemberRegistry(connection, 2 * LEASE_MS)
        async with registry.lease(PREFILL), registry.watch(LOOK_MS, seen.append) as view:
            await until(view, lambda members: members == (PREFILL,))
            with stopped(server):
                await eventually(lambda: is_away(connection))
                await asyncio.sleep(2.4 * LEASE_MS / 1000)  # it runs out
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


async def has_lease(registry: MemberRegistry, member: Member) -> bool:
    try:
        return member in await registry.read_members()
    except UnavailableError:
        return False


async def test_a_redis_that_forgot_everything_is_told_again_before_anyone_notices(
    long_registry: MemberRegistry, connection: RedisConnection
) -> None:
    seen: list[tuple[Member, ...]] = []
    async with long_registry.lease(PREFILL), long_registry.watch(LOOK_MS, seen.append) as view:
        await connection.run(lambda client: client.flushall())
        await eventually(lambda: has_lease(long_registry, PREFILL))
        await long_registry.look(view)
    assert seen == [(PREFILL,)]


async def test_entering_without_redis_works_and_the_lease_follows(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 200) as connection:
        registry = MemberRegistry(connection, 60_000)
        with stopped(server):
            lease, watch = registry.lease(PREFILL), registry.watch(LOOK_MS)
            async with asyncio.timeout(30):
                await lease.__aenter__()
                view = await watch.__aenter__()
            assert not await view.wait_until_looked(timeout_ms=50)
        assert await view.wait_until_looked(timeout_ms=30_000)
        await until(view, lambda members: members == (PREFILL,))
        await watch.__aexit__(None, None, None)
        await lease.__aexit__(None, None, None)
        assert await registry.read_members() == ()


async def test_leaving_without_redis_does_not_fail(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 200) as connection:
        async with MemberRegistry(connection, LEASE_MS).lease(PREFILL):
            pass
        with stopped(server):
            async with asyncio.timeout(30), MemberRegistry(connection, LEASE_MS).lease(PREFILL):
                pass


async def test_leases_are_granted_by_a_redis_without_memory(registry: MemberRegistry, deployment: Deployment) -> None:
    async with registry.lease(PREFILL):
        await deployment.limit_memory("1")
        async with registry.lease(DECODE):
            assert await registry.read_members() == (DECODE, PREFILL)


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_jump_of_this_process_clock_changes_no_lease(
    long_registry: MemberRegistry, connection: RedisConnection, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    seen: list[tuple[Member, ...]] = []
    wall_clock = time.time
    async with long_registry.lease(PREFILL), long_registry.watch(LOOK_MS, seen.append):
        monkeypatch.setattr(time, "time", lambda: wall_clock() + hours * 3600)
        await renewed(connection, PREFILL)
    assert seen == [(PREFILL,)]


async def test_what_another_version_wrote_is_skipped(registry: MemberRegistry, connection: RedisConnection) -> None:
    for instance_id, payload in [
        ("a", "not json"),
        ("b", '{"role": "encode"}'),
        ("c", "[]"),
        ("d", '{"role": "decode"}'),
    ]:
        await connection.run_script(
            "lease",
            ["kvrelay:{registry}:leases", "kvrelay:{registry}:members", "kvrelay:{registry}:withdrawn"],
            (instance_id, payload, 60_000),
        )
    async with registry.lease(PREFILL):
        assert await registry.read_members() == (PREFILL,)


async def test_every_key_has_a_time_to_live(
    registry: MemberRegistry, connection: RedisConnection, deployment: Deployment
) -> None:
    async with registry.lease(PREFILL), registry.lease(DECODE):
        pass
    await die(registry, PREFILL)
    keys = await deployment.keys()
    assert len(keys) == 3
    for key in keys:
        assert await connection.run(lambda client, key=key: client.pttl(key)) > 0  # type: ignore[misc]
