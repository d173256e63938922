"""The bounds of the connection: a server that hangs, a cancelled command, a server that drops
clients, too many at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions

from kvrelay.core.request_state import RequestState
from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.runtime import event_loop
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import MAX_CONNECTIONS, RedisConnection
from kvrelay.state.redis_examination import execute
from kvrelay.state.state_store import StateStore
from tests.support import redis_fixtures
from tests.support.redis_fixtures import HoldingProxy, make_record, stopped

server = redis_fixtures.server

TIMEOUT_MS, LONG_TIMEOUT_MS = 500, 20_000
SLACK_S = 20.0  # against hanging only
CLOSED_TRANSPORT = "unable to perform operation on <TCPTransport closed=True reading=False 0x1>; the handler is closed"


def operations(store: StateStore, registry: MemberRegistry) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: store.create(make_record()),
        lambda: store.transition("r1", 1, RequestState.RESERVING),
        lambda: store.restore(make_record(), [b"a"]),
        lambda: store.append_frames("r1", 1, 0, [b"a"]),
        lambda: store.read_frames("r1", 0, 10),
        lambda: store.get("r1"),
        lambda: store.list_requests(10),
        lambda: store.take_over("r1", "g1", 1),
        lambda: store.claim_idempotency_key("t", "k", "d", "r1", 1000),
        lambda: store.release_idempotency_key("t", "k", "r1"),
        lambda: registry.read_members(),
    ]


@pytest.mark.parametrize("number", range(11))
async def test_a_hanging_server_costs_the_timeout_once_and_then_nothing(server: EmbeddedValkey, number: int) -> None:
    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        run = operations(StateStore(connection, "g1"), MemberRegistry(connection))[number]
        await connection.ping()
        with stopped(server):
            started = time.monotonic()
            with pytest.raises(UnavailableError):
                await run()
            assert TIMEOUT_MS / 1000 * 0.9 < time.monotonic() - started < TIMEOUT_MS / 1000 + SLACK_S
            again = asyncio.ensure_future(run())
            for _ in range(20):
                await asyncio.sleep(0)
            assert again.done(), "it did not ask again"
            with pytest.raises(UnavailableError):
                await again


async def test_it_recovers_within_a_second_however_long_the_server_hung(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        with stopped(server):
            with pytest.raises(UnavailableError):
                await store.get("r1")
            assert not store.healthy
            await asyncio.sleep(2.5)
            assert not store.healthy
        async with asyncio.timeout(1 + SLACK_S):
            await store.health.wait_until_healthy()
        await store.create(make_record())
        assert await store.get("r1") is not None


async def test_a_follower_of_a_hanging_server_gives_up_after_its_wait(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        store = StateStore(connection, "g1")
        await store.create(make_record())
        following = asyncio.create_task(store.read_frames("r1", 0, 10, wait_ms=300))
        await until_blocked(connection)
        started = time.monotonic()
        with stopped(server), pytest.raises(UnavailableError):
            await following
        assert time.monotonic() - started < (300 + TIMEOUT_MS) / 1000 + SLACK_S


async def until_blocked(connection: RedisConnection) -> None:
    async with asyncio.timeout(30):
        while True:
            information = await connection.run(lambda client: client.info("clients"))
            if information["blocked_clients"]:
                return


@pytest.mark.parametrize(
    "answer", ["MISCONF Redis is configured to save RDB snapshots", "BUSY Redis is busy running a script"]
)
async def test_a_server_that_refuses_to_write_is_away_until_it_answers_a_ping(
    server: EmbeddedValkey, answer: str
) -> None:
    async def refused(client: object) -> None:
        raise redis.exceptions.ResponseError(answer)

    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        with pytest.raises(UnavailableError, match="refuses to write"):
            await connection.run(refused)
        assert not connection.health.healthy
        async with asyncio.timeout(1 + SLACK_S):
            await connection.health.wait_until_healthy()


async def test_it_recovers_though_an_idle_connection_cannot_be_closed(
    server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []

    async def fail(pool: object, inuse_connections: bool = True) -> None:
        closed.append(pool)
        raise ConnectionResetError("already gone")

    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(redis.asyncio.ConnectionPool, "disconnect", fail)
            with stopped(server), pytest.raises(UnavailableError):
                await StateStore(connection, "g1").get("r1")
            async with asyncio.timeout(1 + SLACK_S):
                await connection.health.wait_until_healthy()
        assert len(closed) == 2


async def test_a_server_that_is_gone_is_unavailable_at_once() -> None:
    server = EmbeddedValkey()
    await server.start()
    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        await connection.ping()
        await server.stop()
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").get("r1")
        with pytest.raises(UnavailableError, match="--redis-url"):
            await connection.ping()
        assert not connection.health.healthy


async def test_connections_that_the_server_dropped_are_replaced_unnoticed(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 20_000) as connection:
        await asyncio.gather(*(connection.ping() for _ in range(5)))
        async with RedisConnection(server.url, 20_000) as other:
            assert (
                await other.run(lambda client: execute(client, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"))
                >= 1
            )
        store = StateStore(connection, "g1")
        assert await asyncio.gather(*(store.get("r1") for _ in range(5))) == [None] * 5
        assert connection.health.healthy


async def test_many_operations_share_few_connections(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, 20_000) as connection:
        store = StateStore(connection, "g1")
        await asyncio.gather(*(store.create(make_record(str(number))) for number in range(300)))
        clients = await connection.run(lambda client: client.client_list())
        assert len(clients) <= MAX_CONNECTIONS + 1


async def test_waiting_for_a_connection_is_bounded_and_no_sign_of_a_dead_server(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, LONG_TIMEOUT_MS) as connection:
        free = asyncio.Event()

        async def occupy(client: object) -> None:
            await free.wait()

        # The last one to wait gets no connection; the occupants are cancelled before they time out.
        occupants = [asyncio.create_task(connection.run(occupy)) for _ in range(MAX_CONNECTIONS)]
        await asyncio.sleep(0)
        late = asyncio.create_task(StateStore(connection, "g1").get("r1"))
        await asyncio.sleep(TIMEOUT_MS / 1000)
        for occupant in occupants:
            occupant.cancel()
        await asyncio.wait(occupants)
        assert await late is None
        assert connection.health.healthy


async def test_a_closed_connection_refuses(server: EmbeddedValkey) -> None:
    connection = RedisConnection(server.url, TIMEOUT_MS)
    await connection.close()
    await connection.close()
    with pytest.raises(UnavailableError, match="closed"):
        await StateStore(connection, "g1").get("r1")


async def test_a_connection_can_be_closed_while_the_server_hangs(server: EmbeddedValkey) -> None:
    connection = RedisConnection(server.url, TIMEOUT_MS)
    with stopped(server):
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").get("r1")
        async with asyncio.timeout(1 + SLACK_S):
            await connection.close()


def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="redis_url is 'ftp://x'"):
        RedisConnection("ftp://x")


# --- a cancelled command's connection is not used again


async def ask(connection: RedisConnection, text: str) -> str:
    answer = await connection.run(lambda client: execute(client, "ECHO", text))
    assert isinstance(answer, bytes)
    return answer.decode()


async def test_a_command_cancelled_at_any_byte_of_its_answer_leaves_no_answer_behind(server: EmbeddedValkey) -> None:
    answer_bytes = len("$9\r\ncancelled\r\n")
    async with HoldingProxy(server) as proxy, RedisConnection(proxy.url, 20_000) as connection:
        assert await ask(connection, "warm") == "warm"
        for num_bytes in range(answer_bytes):
            before = proxy.num_connections
            proxy.hold_after(num_bytes)
            task = asyncio.create_task(ask(connection, "cancelled"))
            await asyncio.wait_for(proxy.holds.wait(), 30)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            proxy.release()
            assert await ask(connection, f"next {num_bytes}") == f"next {num_bytes}"
            assert proxy.num_connections == before + 1, "the connection was used again"


@pytest.mark.parametrize("warm", [True, False])
async def test_a_command_cancelled_at_any_await_leaves_no_answer_behind(server: EmbeddedValkey, warm: bool) -> None:
    num_cancelled = num_finished = 0
    async with HoldingProxy(server) as proxy, RedisConnection(proxy.url, 20_000) as connection:
        for num_steps in range(400):
            if not warm:
                await connection._client.commands.connection_pool.disconnect()
            task = asyncio.create_task(ask(connection, f"cancelled {num_steps}"))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            num_cancelled += task.cancelled()
            num_finished += not task.cancelled()
            assert await ask(connection, f"next {num_steps}") == f"next {num_steps}"
            if num_finished > 5:
                break
        assert connection.health.healthy
    assert num_cancelled > 3
    assert num_finished, "the steps did not reach the command's end"


async def test_a_timed_out_command_leaves_no_answer_behind(server: EmbeddedValkey) -> None:
    async with (
        HoldingProxy(server) as proxy,
        RedisConnection(proxy.url, TIMEOUT_MS) as connection,
    ):
        assert await ask(connection, "warm") == "warm"
        proxy.hold_after(3)
        with pytest.raises(UnavailableError):
            await ask(connection, "late")
        assert proxy.holds.is_set()
        proxy.release()
        async with asyncio.timeout(1 + SLACK_S):
            await connection.health.wait_until_healthy()
        assert await ask(connection, "next") == "next"


async def test_no_operation_loses_a_connection_for_good_when_cancelled(server: EmbeddedValkey) -> None:
    async with HoldingProxy(server) as proxy, RedisConnection(proxy.url, 20_000) as connection:
        for _ in range(3):
            proxy.hold_after(0)
            tasks = [asyncio.create_task(ask(connection, str(number))) for number in range(3 * MAX_CONNECTIONS)]
            await asyncio.wait_for(proxy.holds.wait(), 30)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            proxy.release()
        expected = [str(number) for number in range(3 * MAX_CONNECTIONS)]
        assert await asyncio.gather(*(ask(connection, text) for text in expected)) == expected


async def test_a_connection_that_uvloop_finds_closed_is_made_anew_once(server: EmbeddedValkey) -> None:
    async with RedisConnection(server.url, TIMEOUT_MS) as connection:
        errors = [RuntimeError(CLOSED_TRANSPORT)]

        async def ask(client: "redis.asyncio.Redis") -> Any:
            if errors:
                raise errors.pop()
            return await client.ping()

        assert await connection.run(ask)
        assert connection.health.healthy
        errors[:] = [RuntimeError(CLOSED_TRANSPORT), RuntimeError(CLOSED_TRANSPORT)]
        with pytest.raises(UnavailableError):
            await connection.run(ask)
        async with asyncio.timeout(30):
            await connection.health.wait_until_healthy()
        errors[:] = [RuntimeError("a defect")]
        with pytest.raises(RuntimeError, match="a defect"):
            await connection.run(ask)


async def test_under_uvloop_a_broken_connection_is_not_taken_for_a_defect(server: EmbeddedValkey) -> None:
    async def write_to_the_closed() -> None:
        async with RedisConnection(server.url, 20_000) as connection:
            seen: list[str] = []

            async def ask(client: "redis.asyncio.Redis") -> Any:
                async with client.client() as one:
                    await one.ping()
                    if seen:
                        return await one.ping()
                    broken: Any = one.connection
                    broken._writer.transport.abort()
                    await asyncio.sleep(0.05)
                    try:
                        return await broken.send_command("PING")
                    except RuntimeError as error:
                        seen.append(str(error))
                        raise

            assert await connection.run(ask)
            assert seen, "uvloop says so by a RuntimeError"
            assert connection.health.healthy

    # In a thread: its end takes the event loop from the one it ran in, and other tests have theirs
    # here.
    await asyncio.to_thread(lambda: event_loop.run(write_to_the_closed()))
