"""Answers that are the server's state, the network's or a setting's: none of them is a defect, and
each says what to do.
"""

import asyncio
import socket
import ssl

import pytest
import redis.exceptions

from kvrelay.core.member import Member, MemberRole
from kvrelay.core.request_state import RequestState
from kvrelay.errors import ConfigError, StoreFullError, UnavailableError, UnreadableStateError
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_faults import CLUSTER_SENTENCE, fault_of
from kvrelay.state.state_store import StateStore
from tests.support.redis_fixtures import FakeRedis, bulk, eventually, make_record

TIMEOUT_MS = 5000

PASSING = {
    "NOREPLICAS Not enough good replicas to write.": "replicas",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.": "disk",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": "script",
    "UNKILLABLE Sorry the script already executed write commands against the dataset.": "script",
    "NOTBUSY No scripts in execution right now.": "script",
    "LOADING Redis is loading the dataset in memory": "loading",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "primary",
    "READONLY You can't write against a read only replica. script: 0a1b, on @user_script:14.": "replica",
    "CLUSTERDOWN The cluster is down": "Cluster",
    "CLUSTERDOWN Hash slot not served": "Cluster",
    "TRYAGAIN Multiple keys request during rehashing of slot": "Cluster",
    "EXECABORT Transaction discarded because of previous errors.": "transaction",
    "ERR max number of clients reached": "maxclients",
    "ERR Connection refused": "Connection refused",
    "ERR server closed connection": "closed connection",
    "no upstream host": "upstream",
    "SOMENEWCODE of a server to come": "SOMENEWCODE",
}
WRONG_SETTINGS = {
    "NOAUTH Authentication required.": "password",
    "WRONGPASS invalid username-password pair or user is disabled.": "password",
    "NOPERM this user has no permissions to run the 'evalsha' command": "~kvrelay:* +@read",
    "NOPERM No permissions to access a key": "~kvrelay:*",
    "ERR ACL failure in script: User u has no permissions to run the 'hset' command script: 0a, on "
    "@user_script:35.": "HSET",
    "ERR Unknown Redis command called from script script: 0a, on @user_script:35.": "renamed or disabled",
    "DENIED Redis is running in protected mode because protected mode is enabled": "protected mode",
    "MOVED 3999 127.0.0.1:6381": "Redis Cluster",
    "ASK 3999 127.0.0.1:6381": "Redis Cluster",
    "CROSSSLOT Keys in request don't hash to the same slot": "Redis Cluster",
    "ERR unknown command 'EVALSHA', with args beginning with: 'secret'": "EVALSHA",
    "ERR Error compiling script (new function): user_script:1: unexpected symbol near '#'": "7.0",
    "ERR operation not permitted": "password",
}
DEFECTS = [
    "ERR syntax error",
    "ERR wrong number of arguments for 'xadd' command",
    "ERR user_script:3: nonexistent variable",
]


@pytest.mark.parametrize(("answer", "said"), [*PASSING.items(), *WRONG_SETTINGS.items()])
async def test_a_refusal_is_an_outage_that_says_why_and_ends_when_it_ends(answer: str, said: str) -> None:
    refuses = True

    def say(words: list[bytes]) -> bytes:
        return f"-{answer}\r\n".encode() if refuses and words[0] in (b"EVALSHA", b"EVAL", b"PING") else b""

    async with FakeRedis(say) as server, RedisConnection(server.url, TIMEOUT_MS) as connection:
        store, registry = StateStore(connection, "g1"), MemberRegistry(connection)
        with pytest.raises(UnavailableError) as refusal:
            await store.claim_idempotency_key("t", "k", "d", "r1", 1000)
        assert refusal.value.retry_after_ms is not None
        assert said in (connection.health.problem or "")
        assert "secret" not in (connection.health.problem or "")
        with pytest.raises(UnavailableError):
            await connection.ping()
        # neither fails
        async with registry.lease(Member("g1", MemberRole.GATEWAY, "h:1")), registry.watch():
            num_before = server.num_commands
            await _until_looked(server, num_before + 3)
            assert not connection.health.healthy, "it is asked again and again, and refuses as before"
            refuses = False
            async with asyncio.timeout(10):
                await connection.health.wait_until_healthy()
        assert connection.health.problem is None


async def _until_looked(server: FakeRedis, num_commands: int) -> None:
    async def looked() -> bool:
        return server.num_commands >= num_commands

    await eventually(looked)


@pytest.mark.parametrize(("answer", "said"), WRONG_SETTINGS.items())
async def test_a_process_does_not_start_at_a_redis_that_needs_another_setting_first(answer: str, said: str) -> None:
    async with (
        FakeRedis(lambda words: f"-{answer}\r\n".encode() if words[0] in (b"EVALSHA", b"EVAL") else b"") as server,
        RedisConnection(server.url, TIMEOUT_MS) as connection,
    ):
        with pytest.raises(ConfigError, match="cannot be used") as refusal:
            await connection.check()
        assert said in refusal.value.message
        assert "secret" not in refusal.value.message


@pytest.mark.parametrize("answer", PASSING)
async def test_a_process_starts_though_redis_is_away_for_now(answer: str) -> None:
    async with (
        FakeRedis(lambda words: f"-{answer}\r\n".encode() if words[0] in (b"EVALSHA", b"EVAL") else b"") as server,
        RedisConnection(server.url, TIMEOUT_MS) as connection,
    ):
        await connection.check()


@pytest.mark.parametrize("answer", DEFECTS)
async def test_a_defect_of_a_command_is_none_of_redis(answer: str) -> None:
    async with (
        FakeRedis(lambda words: f"-{answer}\r\n".encode() if words[0] == b"EVALSHA" else b"") as server,
        RedisConnection(server.url, TIMEOUT_MS) as connection,
    ):
        with pytest.raises(redis.exceptions.ResponseError):
            await StateStore(connection, "g1").transition("r1", 1, RequestState.RESERVING)
        assert connection.health.healthy


async def test_no_memory_and_foreign_contents_stay_what_they_were() -> None:
    answers = {
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n": StoreFullError,
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n": UnreadableStateError,
    }
    for answer, kind in answers.items():
        async with (
            FakeRedis(lambda words, answer=answer: answer if words[0] == b"EVALSHA" else b"") as server,  # type: ignore[misc]
            RedisConnection(server.url, TIMEOUT_MS) as connection,
        ):
            with pytest.raises(kind):
                await StateStore(connection, "g1").create(make_record())
            assert connection.health.healthy


@pytest.mark.parametrize("mode", ["sentinel", "cluster"])
async def test_what_is_no_single_redis_is_refused_with_what_to_give_instead(mode: str) -> None:
    information = f"redis_version:7.2.0\r\nredis_mode:{mode}\r\n".encode()

    def say(words: list[bytes]) -> bytes:
        return bulk(information) if words[0] == b"INFO" else b""

    async with FakeRedis(say) as server, RedisConnection(server.url, TIMEOUT_MS) as connection:
        with pytest.raises(
            ConfigError,
            match=r"Sentinel: write redis\+sentinel://" if mode == "sentinel" else "node of a Redis Cluster",
        ):
            await connection.check()


async def test_a_redis_that_is_too_old_is_refused() -> None:
    information = b"redis_version:6.2.14\r\nredis_mode:standalone\r\n"

    def say(words: list[bytes]) -> bytes:
        return bulk(information) if words[0] == b"INFO" else b""

    async with FakeRedis(say) as server, RedisConnection(server.url, TIMEOUT_MS) as connection:
        with pytest.raises(ConfigError, match=r"needs Redis 7\.0"):
            await connection.check()


async def test_what_is_no_redis_at_all_is_said_to_be_none() -> None:
    async with (
        FakeRedis(lambda words: b"HTTP/1.1 400 Bad Request\r\n\r\n") as server,
        RedisConnection(server.url) as connection,
    ):
        with pytest.raises(ConfigError, match="is no Redis"):
            await connection.check()


async def test_a_list_of_requests_that_redis_refuses_to_read_is_unavailable_and_not_unreadable() -> None:
    def say(words: list[bytes]) -> bytes:
        if words[0] == b"ZRANGE":
            return b"*2\r\n$2\r\nr1\r\n$1\r\n1\r\n"
        return b"-MOVED 3999 127.0.0.1:6381\r\n" if words[0] == b"HMGET" else b"*2\r\n$1\r\n1\r\n$1\r\n1\r\n"

    def connect(words: list[bytes]) -> bytes:
        return say(words) if words[0] in (b"ZRANGE", b"HMGET", b"TIME") else b""

    async with FakeRedis(connect) as server, RedisConnection(server.url, TIMEOUT_MS) as connection:
        with pytest.raises(UnavailableError):
            await StateStore(connection, "g1").list_requests(10)
        assert connection.health.problem == CLUSTER_SENTENCE


CAUSES: list[tuple[Exception, str, bool]] = [
    (ConnectionRefusedError(111, "Connection refused"), "connection refused", False),
    (socket.gaierror(-2, "Name or service not known"), "is not known (Name or service not known)", False),
    (FileNotFoundError(2, "No such file or directory"), "is not there", False),
    (PermissionError(13, "Permission denied"), "permission denied", False),
    (ConnectionResetError(104, "Connection reset by peer"), "broke", False),
    (OSError(101, "Network is unreachable"), "Network is unreachable", False),
    (TimeoutError(), "in time", False),
    (ssl.SSLCertVerificationError(1, "certificate verify failed"), "certificate does not verify", True),
]


@pytest.mark.parametrize(("cause", "said", "needs_a_person"), CAUSES)
def test_a_cause_is_found_however_deep_it_lies(cause: Exception, said: str, needs_a_person: bool) -> None:
    outer = redis.exceptions.ConnectionError("Error 1 connecting to h:1.")
    outer.__cause__ = middle = RuntimeError()
    middle.__context__ = cause
    fault = fault_of(outer)
    assert fault is not None
    assert said in fault.sentence
    assert fault.needs_a_person == needs_a_person


def test_an_error_that_is_none_of_redis_has_no_such_cause() -> None:
    assert fault_of(ValueError("a defect")) is None
