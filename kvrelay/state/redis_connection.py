"""Bounded access to Redis or Valkey. Commands fail at once while Redis is known to be away."""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from importlib import resources
from types import TracebackType
from typing import Any, Self, TypeVar

import redis.asyncio
import redis.exceptions
import structlog

from kvrelay.core.backoff import Backoff
from kvrelay.errors import ConfigError, StoreFullError, UnavailableError, UnreadableStateError
from kvrelay.runtime.own_time import own_time_limit
from kvrelay.state.redis_clients import RedisClient, make_client
from kvrelay.state.redis_examination import examine, examine_sentinels, execute, look_for_tls
from kvrelay.state.redis_faults import BROKEN_SENTENCE, NO_ANSWER_SENTENCE, RedisFault, fault_of
from kvrelay.state.redis_tls import RedisTLS
from kvrelay.state.redis_url import RedisKind, parse_redis_url
from kvrelay.state.store_health import NO_ANSWER_MESSAGE, RETRY_AFTER_MS, StoreHealth

MAX_CONNECTIONS = 16
MAX_FOLLOWERS = 256
FIRST_LOOK_DELAY_S = 0.02
MAX_LOOK_DELAY_S = 0.5
CHECK_TIMEOUT_S = 2.0  # at a process's start, and to find the nodes of a cluster again
CONNECT_TIMEOUT_S = 0.5
"""Least time for a connection to one of several hosts."""
REFUSED_MESSAGE = "The state store refuses to write or read now; `kvrelay health` says why. Try again in a moment."

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)

_ERRORS = (OSError, TimeoutError, redis.exceptions.RedisError, redis.exceptions.RedisClusterException)
"""Errors of commands, besides uvloop's RuntimeError."""

_CLOSED = "the handler is closed"
"""Part of uvloop's error for a broken connection."""

_GARBAGE = (
    "WRONGTYPE",
    "attempt to compare",
    "attempt to perform arithmetic",
    "attempt to concatenate",
    "Invalid stream ID",
    "specified in XADD",
)
"""Parts of answers when a key holds what kvrelay never writes."""


class RedisConnection:
    """A command that ends early closes its connection, because its late answer must not be taken
    for the next command's. After a broken connection a command is sent once more.

    Raises:
        ConfigError: not a Redis url, or certificates that cannot be used.
    """

    def __init__(self, url: str, timeout_ms: int = 200) -> None:
        self._timeout_s = timeout_ms / 1000
        self._target = parse_redis_url(url)
        self._tls = RedisTLS(self._target.options) if self._target.uses_tls else None
        connect_timeout_s = max(CONNECT_TIMEOUT_S, self._timeout_s / 2)
        self._client = make_client(self._target, self._tls, MAX_CONNECTIONS + 1, connect_timeout_s)
        self._follower_client = make_client(self._target, self._tls, MAX_FOLLOWERS, connect_timeout_s)
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._follower_slots = asyncio.Semaphore(MAX_FOLLOWERS)
        self._health = StoreHealth(address=self._target.address)
        self._is_examined = False
        self._recovery: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def health(self) -> StoreHealth:
        return self._health

    async def run(self, operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]]) -> _Answer:
        """Runs an operation that is harmless to repeat.

        Raises:
            UnavailableError: Redis does not answer, or all connections are busy.
            StoreFullError: Redis is out of memory.
            UnreadableStateError: a key holds what kvrelay never writes.
        """
        return await self._run(operation, self._client, self._slots, self._timeout_s)

    async def run_script(self, name: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]) -> Any:
        """Runs `kvrelay/state/lua/NAME.lua`; raises as `run` does."""
        return await self.run(lambda client: _evaluate(client, name, keys, arguments))

    async def wait_for_entry(self, stream: str, last_id: str, wait_ms: int) -> None:
        """Waits for an entry after `last_id`, on a connection of its own."""
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
        """Works while the breaker is open too; UnavailableError says why Redis does not answer."""
        try:
            async with own_time_limit(self._timeout_s):
                await _attempt(self._ping_primaries, self._client)
        except _ERRORS as error:
            fault = fault_of(error)
            reason = fault.sentence if fault is not None else str(error)
            raise UnavailableError(f"Redis does not answer: {reason}. Check --redis-url.") from error

    async def _ping_primaries(self, client: "redis.asyncio.Redis") -> None:
        for place in self._client.primaries():
            await execute(client, "PING", **place)

    async def check(self) -> None:
        """Raises ConfigError for settings that forbid any use of this Redis. Passes when Redis is
        away.
        """
        fault = await self._look(max(self._timeout_s, CHECK_TIMEOUT_S))
        if fault is not None and fault.needs_a_person:
            raise ConfigError(f"the Redis at {self._target.address} cannot be used: {fault.sentence}")

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        await self._client.close()
        await self._follower_client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self,
        operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]],
        client: RedisClient,
        slots: asyncio.Semaphore,
        limit_s: float,
    ) -> _Answer:
        if self._closed:
            raise UnavailableError("The state store is closed.")
        self._health.check()
        sent = False
        try:
            async with own_time_limit(limit_s), slots:
                self._health.check()
                sent = True
                return await _attempt(operation, client)
        except redis.exceptions.OutOfMemoryError as error:
            raise StoreFullError(
                "The state store is out of memory; new requests are taken when old ones are forgotten."
            ) from error
        except _ERRORS as error:
            if isinstance(error, redis.exceptions.ResponseError) and any(sign in str(error) for sign in _GARBAGE):
                problem = (
                    "The state store holds what kvrelay did not write; give it a database of its own with --redis-url."
                )
                raise UnreadableStateError(problem) from error
            fault = fault_of(error)
            if fault is None:
                raise
            # Waiting for other commands says nothing about Redis; those commands will.
            if sent:
                self._fail(fault)
            message = REFUSED_MESSAGE if fault.is_refusal else NO_ANSWER_MESSAGE
            raise UnavailableError(message, RETRY_AFTER_MS) from error

    def _fail(self, fault: RedisFault) -> None:
        if fault.needs_a_person:
            self._is_examined = False
        if self._health.open(fault) and not self._closed:
            self._recovery = asyncio.create_task(self._recover(), name="redis recovery")

    async def _recover(self) -> None:
        for client in (self._client, self._follower_client):
            await self._forget(client)
        backoff = Backoff(FIRST_LOOK_DELAY_S, MAX_LOOK_DELAY_S, random.random)
        has_several = self._target.kind is not RedisKind.SINGLE
        limit_s = max(self._timeout_s, CHECK_TIMEOUT_S) if has_several else self._timeout_s
        while not self._health.healthy:
            await asyncio.sleep(backoff.next_delay_s())
            try:
                fault = await self._look(limit_s)
            except Exception:
                _log.exception("redis cannot be examined")
                fault = RedisFault("the look at Redis failed; the log says how")
            if fault is None:
                self._health.close()
            else:
                self._health.record_failed_probe(fault)

    async def _look(self, limit_s: float) -> RedisFault | None:
        """Tries all that kvrelay does in Redis. PING is not enough: replicas answer it too."""
        fault = await self._try_all(limit_s)
        if fault is None or fault.is_refusal or fault.needs_a_person:
            return fault
        signs = (BROKEN_SENTENCE,) if self._tls is None else (BROKEN_SENTENCE, NO_ANSWER_SENTENCE)
        return (await look_for_tls(self._target, self._tls) if fault.sentence in signs else None) or fault

    async def _try_all(self, limit_s: float) -> RedisFault | None:
        try:
            if self._target.kind is not RedisKind.SINGLE:
                await self._forget(self._client)  # which node is the primary
            if not self._is_examined:
                async with own_time_limit(limit_s):
                    fault = await self._examine()
                if fault is not None:
                    return fault
                self._is_examined = True
            async with own_time_limit(limit_s):
                await _attempt(lambda client: _probe(client, self._client.probe_tags()), self._client)
        except _ERRORS as error:
            fault = fault_of(error)
            if fault is None:
                return RedisFault(f"Redis refuses what kvrelay does there ({type(error).__name__})", is_refusal=True)
            return fault
        return None

    async def _examine(self) -> RedisFault | None:
        if self._client.sentinels:
            fault = await examine_sentinels(self._client.sentinels, self._target.service)
            if fault is not None:
                return fault
        return await _attempt(partial(examine, places=self._client.primaries), self._client)

    async def _forget(self, client: RedisClient) -> None:
        """A failure to close a connection must not end the recovery."""
        with contextlib.suppress(*_ERRORS):
            async with asyncio.timeout(self._timeout_s):
                await client.forget_connections()


async def check_redis_at(url: str) -> None:
    """Raises ConfigError as `RedisConnection` and its `check`."""
    async with RedisConnection(url) as connection:
        await connection.check()


async def _probe(client: "redis.asyncio.Redis", tags: Sequence[str]) -> None:
    for tag in tags:
        await _evaluate(client, "probe", [f"kvrelay:{{{tag}}}:{kind}" for kind in ("hash", "log", "list")], ())


async def _evaluate(
    client: "redis.asyncio.Redis", name: str, keys: Sequence[str], arguments: Sequence[str | int | bytes]
) -> Any:
    text, digest = _script(name)
    try:
        return await execute(client, "EVALSHA", digest, len(keys), *keys, *arguments)
    except redis.exceptions.NoScriptError:  # new, or Redis was restarted
        return await execute(client, "EVAL", text, len(keys), *keys, *arguments)


async def _attempt(operation: Callable[["redis.asyncio.Redis"], Awaitable[_Answer]], client: RedisClient) -> _Answer:
    try:
        await client.prepare()
        return await operation(client.commands)
    except RuntimeError as error:
        _check_closed(error)
    try:
        await client.prepare()
        return await operation(client.commands)
    except RuntimeError as error:
        _check_closed(error)
        raise redis.exceptions.ConnectionError(str(error)) from error


def _check_closed(error: RuntimeError) -> None:
    if _CLOSED not in str(error):
        raise error


@cache
def _script(name: str) -> tuple[str, str]:
    folder = resources.files("kvrelay.state") / "lua"
    first_line, rest = (folder / f"{name}.lua").read_text("utf-8").split("\n", 1)
    text = "\n".join((first_line, (folder / "prelude.lua").read_text("utf-8"), rest))
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
