"""A bounded way to Redis or Valkey: every command has a time limit, and none is sent while Redis is known to be away.

Shared by the state store and the worker registry of a process. Knows nothing of requests or workers.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib import resources
from types import TracebackType
from typing import Any, Self, TypeVar

import redis.asyncio
import redis.exceptions
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvrelay.backoff import Backoff
from kvrelay.errors import ConfigError, StoreFullError, UnavailableError, UnreadableStateError

MAX_CONNECTIONS = 16
MAX_FOLLOWERS = 256
FIRST_PING_DELAY_S = 0.02
MAX_PING_DELAY_S = 0.5
RETRY_AFTER_MS = 500
NO_ANSWER_MESSAGE = "The state store does not answer; try again in a moment."

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)

_AWAY = (
    TimeoutError,
    OSError,
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterError,
)
"""What says that this Redis cannot be used now: no answer, still loading, or a replica."""

_CLOSED = "the handler is closed"
"""In uvloop's error for a write to a connection that has broken."""

_REFUSALS = ("MISCONF", "BUSY ")
"""Beginnings of answers that redis-py has no error of its own for: it cannot save to its disk, or a script hangs in it."""

_GARBAGE = (
    "WRONGTYPE",
    "attempt to compare",
    "attempt to perform arithmetic",
    "attempt to concatenate",
    "Invalid stream ID",
    "specified in XADD",
)
"""What is in answers when a key, or a field that a script computes with, holds what kvrelay never writes."""


class StoreHealth:
    """A breaker. It opens with the first failure and closes with the first ping that is answered."""

    def __init__(self) -> None:
        self._healthy = asyncio.Event()
        self._healthy.set()

    @property
    def healthy(self) -> bool:
        """False while the breaker is open."""
        return self._healthy.is_set()

    async def wait_until_healthy(self) -> None:
        """Returns at once while the breaker is closed, else when it closes. Not bounded: for background work only."""
        await self._healthy.wait()

    def check(self) -> None:
        """Raises UnavailableError while the breaker is open."""
        if not self.healthy:
            raise UnavailableError(NO_ANSWER_MESSAGE, RETRY_AFTER_MS)

    def open(self, cause: BaseException) -> bool:
        """Redis failed; True when that is news."""
        if not self.healthy:
            return False
        _log.warning("redis is away", cause=repr(cause))
        self._healthy.clear()
        return True

    def close(self) -> None:
        """Redis answered."""
        if not self.healthy:
            _log.info("redis is back")
        self._healthy.set()


class RedisConnection:
    """Connections to one Redis. `async with RedisConnection(url) as redis: ...`

    A cancelled or timed out command's connection is closed: its late answer must never be taken for the next command's. Commands
    are sent once more on a new connection when theirs breaks, so what is run here must be harmless to repeat.

    Args:
        url: redis://, rediss:// or unix://.
        timeout_ms: most time for one operation.

    Raises:
        ConfigError: the url is none.
    """

    def __init__(self, url: str, timeout_ms: int = 200) -> None:
        self._timeout_s = timeout_ms / 1000
        self._client = _client(url, MAX_CONNECTIONS + 1)
        self._follower_client = _client(url, MAX_FOLLOWERS)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._follower_slots = asyncio.Semaphore(MAX_FOLLOWERS)
        self._health = StoreHealth()
        self._recovery: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def health(self) -> StoreHealth:
        """The breaker of these connections."""
        return self._health

    async def run(self, operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]]) -> _Answer:
        """Runs commands within the time limit.

        Args:
            operation: gets the client; harmless to repeat.

        Raises:
            UnavailableError: Redis does not answer, or all connections are busy.
            StoreFullError: Redis is out of memory.
            UnreadableStateError: a key holds something else than what kvrelay writes.
        """
        return await self._run(operation, self._client, self._slots, self._timeout_s)

    async def run_script(self, name: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        """Runs `kvrelay/lua/NAME.lua`; raises as `run` does."""
        script = self._client.register_script(_script_text(name))
        return await self.run(lambda client: script(keys=list(keys), args=list(arguments), client=client))

    async def wait_for_entry(self, stream: str, last_id: str, wait_ms: int) -> None:
        """Waits for a stream's entry after `last_id`, at most `wait_ms`, on a connection that nobody else uses meanwhile."""
        if self._follower_slots.locked():
            await asyncio.sleep(min(wait_ms, 100) / 1000)
            return
        await self._run(
            lambda client: execute(client, "XREAD", "COUNT", 1, "BLOCK", wait_ms, "STREAMS", stream, last_id),
            self._follower_client,
            self._follower_slots,
            self._timeout_s + wait_ms / 1000,
        )

    async def ping(self) -> None:
        """Asks whether Redis answers, whatever the breaker says.

        Raises:
            UnavailableError: says why it does not.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await _attempt(lambda client: execute(client, "PING"), self._client)
        except (*_AWAY, redis.exceptions.RedisError) as error:
            raise UnavailableError(f"Redis does not answer: {error or type(error).__name__}. Check --redis-url.") from error

    async def close(self) -> None:
        """Closes all connections. Idempotent."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._client.aclose()
        await self._follower_client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _run(
        self,
        operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]],
        client: "redis.asyncio.Redis",
        slots: asyncio.Semaphore,
        limit_s: float,
    ) -> _Answer:
        if self._closed:
            raise UnavailableError("The state store is closed.")
        self._health.check()
        sent = False
        try:
            async with asyncio.timeout(limit_s), slots:
                self._health.check()
                sent = True
                return await _attempt(operation, client)
        except _AWAY as error:
            # Time spent waiting for other commands says nothing about Redis; theirs will.
            if sent:
                self._fail(error)
            raise UnavailableError(NO_ANSWER_MESSAGE, RETRY_AFTER_MS) from error
        except redis.exceptions.OutOfMemoryError as error:
            raise StoreFullError(
                "The state store is out of memory; new work is taken when old requests are forgotten."
            ) from error
        except redis.exceptions.ResponseError as error:
            if any(sign in str(error) for sign in _GARBAGE):
                problem = "The state store holds what kvrelay did not write; give it a database of its own with --redis-url."
                raise UnreadableStateError(problem) from error
            if not str(error).startswith(_REFUSALS):
                raise
            self._fail(error)
            raise UnavailableError("The state store refuses to write; see its log.") from error

    def _fail(self, cause: BaseException) -> None:
        if self._health.open(cause) and not self._closed:
            self._recovery = asyncio.create_task(self._recover(), name="redis recovery")

    async def _recover(self) -> None:
        # Idle connections may lead to a server that is no longer the primary. A failure to close one must not end the recovery.
        for client in (self._client, self._follower_client):
            with contextlib.suppress(*_AWAY, redis.exceptions.RedisError):
                async with asyncio.timeout(self._timeout_s):
                    await client.connection_pool.disconnect(inuse_connections=False)
        backoff = Backoff(FIRST_PING_DELAY_S, MAX_PING_DELAY_S)
        while not self._health.healthy:
            await asyncio.sleep(backoff.next_delay_s())
            with contextlib.suppress(UnavailableError):
                await self.ping()
                self._health.close()


async def execute(client: "redis.asyncio.Redis", *command: str | int) -> Any:
    """One command; for use within `RedisConnection.run`."""
    return await client.execute_command(*command)  # type: ignore[no-untyped-call]


async def _attempt(operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]], client: "redis.asyncio.Redis") -> _Answer:
    """Runs it, and once more when uvloop says in its own way that the connection had broken: redis-py knows asyncio's only."""
    try:
        return await operation(client)
    except RuntimeError as error:
        _check_closed(error)
    try:
        return await operation(client)
    except RuntimeError as error:
        _check_closed(error)
        raise redis.exceptions.ConnectionError(str(error)) from error


def _check_closed(error: RuntimeError) -> None:
    """Raises it again unless it is uvloop's for a write to a closed connection."""
    if _CLOSED not in str(error):
        raise error


def _client(url: str, max_connections: int) -> "redis.asyncio.Redis":
    # No time limits in redis-py: ours covers waiting, connecting, sending and receiving as one. Its own use asyncio.wait_for,
    # which can lose a cancellation on Python 3.11 (python/cpython#86296).
    try:
        pool = redis.asyncio.ConnectionPool.from_url(
            url,
            max_connections=max_connections,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=None,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
        )
    except ValueError as error:
        raise ConfigError(f"redis_url is {url!r}: {error}") from error
    return redis.asyncio.Redis.from_pool(pool)


@cache
def _script_text(name: str) -> str:
    folder = resources.files("kvrelay") / "lua"
    first_line, rest = (folder / f"{name}.lua").read_text().split("\n", 1)
    return "\n".join((first_line, (folder / "prelude.lua").read_text(), rest))
