"""redis-py's clients for one server, for a cluster, and for a primary that Sentinels name."""

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import redis.asyncio
import redis.exceptions
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection
from redis.backoff import NoBackoff

from kvrelay.state.redis_tls import RedisTLS, TLSConnection
from kvrelay.state.redis_url import TLS_OPTIONS, RedisKind, RedisTarget

PROBE_TAG = "probe"
MAX_PROBE_TAGS = 100_000
"""Enough to meet each of a thousand primaries."""
CONNECTIONS_IN_RESERVE = 16
"""A cluster's client closes connections behind the commands that come next."""
ASK_INTERVAL_S = 1.0
ROUNDS_TO_FORGET = 10
"""A connection that was in use is forgotten in a later round."""

_CONNECTION_CLASSES: dict[str, type[redis.asyncio.connection.AbstractConnection]] = {
    "redis": redis.asyncio.Connection,
    "rediss": TLSConnection,
    "unix": redis.asyncio.UnixDomainSocketConnection,
}


class _SentinelManagedTLSConnection(SentinelManagedConnection, TLSConnection):
    pass


class RedisClient(Protocol):
    sentinels: Sequence["redis.asyncio.Redis"]
    """They name the primary; () without any."""

    @property
    def commands(self) -> "redis.asyncio.Redis":
        """A cluster's has the same commands."""

    async def prepare(self) -> None:
        """Before each operation."""

    async def forget_connections(self) -> None:
        """After a fault: they may lead to a server that is no longer the primary."""

    def primaries(self) -> Sequence[Mapping[str, Any]]:
        """By which arguments a command goes to each."""

    def probe_tags(self) -> Sequence[str]:
        """A hash tag of each primary."""

    async def close(self) -> None: ...


def make_client(
    target: RedisTarget, tls: RedisTLS | None, max_connections: int, connect_timeout_s: float
) -> RedisClient:
    """`connect_timeout_s`: most time for a connection to one of several hosts."""
    if target.kind is RedisKind.CLUSTER:
        return _ClusterClient(target, tls, max_connections + CONNECTIONS_IN_RESERVE, connect_timeout_s)
    if target.kind is RedisKind.SENTINEL:
        sentinels = _sentinels_of(target, tls, connect_timeout_s)
        return _SentinelClient(_pool_behind(sentinels, target, tls, max_connections, connect_timeout_s), sentinels)
    # No other time limits in redis-py: ours covers the whole operation. redis-py uses
    # asyncio.wait_for, which can lose a cancellation on Python 3.11 (python/cpython#86296).
    pool = redis.asyncio.ConnectionPool(
        connection_class=_CONNECTION_CLASSES[target.scheme],
        max_connections=max_connections,
        **target.location,
        **_credentials(target),
        **_options(target, tls),
        db=target.database,
        socket_connect_timeout=None,
        retry=_once_more(),
    )
    return _PoolClient(pool)


def _sentinels_of(target: RedisTarget, tls: RedisTLS | None, timeout_s: float) -> Sentinel:
    """Each Sentinel has `timeout_s` to answer before the next is asked."""
    sentinels = Sentinel([])  # type: ignore[no-untyped-call]
    for host, port in target.hosts:
        pool = redis.asyncio.ConnectionPool(
            connection_class=_CONNECTION_CLASSES[target.scheme],
            host=host,
            port=port,
            username=target.sentinel_username,
            password=target.sentinel_password,
            **{**_options(target, tls), "socket_timeout": timeout_s},
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        sentinels.sentinels.append(redis.asyncio.Redis.from_pool(pool))
    return sentinels


def _pool_behind(
    sentinels: Sentinel, target: RedisTarget, tls: RedisTLS | None, max_connections: int, connect_timeout_s: float
) -> SentinelConnectionPool:
    return SentinelConnectionPool(  # type: ignore[no-untyped-call]
        target.service,
        sentinels,
        connection_class=SentinelManagedConnection if tls is None else _SentinelManagedTLSConnection,
        max_connections=max_connections,
        **_credentials(target),
        **_options(target, tls),
        db=target.database,
        socket_connect_timeout=connect_timeout_s,
        retry=_once_more(),
    )


class _PoolClient:
    sentinels: Sequence["redis.asyncio.Redis"] = ()

    def __init__(self, pool: redis.asyncio.ConnectionPool) -> None:
        self.commands = redis.asyncio.Redis.from_pool(pool)

    async def prepare(self) -> None:
        """Its connections are made when they are needed."""

    async def forget_connections(self) -> None:
        await self.commands.connection_pool.disconnect(inuse_connections=False)

    def primaries(self) -> Sequence[Mapping[str, Any]]:
        return ({},)

    def probe_tags(self) -> Sequence[str]:
        return (PROBE_TAG,)

    async def close(self) -> None:
        await self.commands.aclose()


class _SentinelClient(_PoolClient):
    """Asks for the primary while it is used: the one before may take writes, and loses them."""

    def __init__(self, pool: SentinelConnectionPool, sentinels: Sentinel) -> None:
        super().__init__(pool)
        self.sentinels = sentinels.sentinels
        self._sentinels = sentinels
        self._service = pool.service_name
        self._primary: tuple[str, int] | None = None
        self._asked_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._num_rounds_to_forget = 0

    async def prepare(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._asking is None and now - self._asked_at >= ASK_INTERVAL_S:
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask(), name="question to sentinels")

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        await super().close()
        for sentinel in self.sentinels:
            await sentinel.aclose()

    async def _ask(self) -> None:
        try:
            with contextlib.suppress(OSError, TimeoutError, RuntimeError, redis.exceptions.RedisError):
                primary = await self._sentinels.discover_master(self._service)
                if self._primary not in (None, primary):
                    self._num_rounds_to_forget = ROUNDS_TO_FORGET
                self._primary = primary
                if self._num_rounds_to_forget:
                    self._num_rounds_to_forget -= 1
                    await self.forget_connections()
        finally:
            self._asking = None


class _ClusterClient:
    sentinels: Sequence["redis.asyncio.Redis"] = ()

    def __init__(
        self, target: RedisTarget, tls: RedisTLS | None, max_connections: int, connect_timeout_s: float
    ) -> None:
        options = _options(target, tls)
        connection = {name: options.pop(name) for name in ("tls",) if name in options}
        self._cluster = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in target.hosts],
            max_connections=max_connections,
            **_credentials(target),
            **options,
            socket_connect_timeout=connect_timeout_s,
            retry=_once_more(),
        )
        self._cluster.commands_parser = cast(Any, _KeysOfCommands())
        # The constructor knows no connections of our own.
        for node in self._cluster.nodes_manager.startup_nodes.values():
            node.connection_class = cast(Any, _CONNECTION_CLASSES[target.scheme])
            node.connection_kwargs.update(connection)
        self._cluster.get_connection_kwargs().update(connection, connection_class=_CONNECTION_CLASSES[target.scheme])
        self.commands = cast("redis.asyncio.Redis", self._cluster)

    async def prepare(self) -> None:
        await self._cluster.initialize()

    async def forget_connections(self) -> None:
        # Also forgets which node has which keys. Older redis-py versions always ask the same node
        # first, which may be the one that hangs.
        await self._cluster.aclose()
        nodes = self._cluster.nodes_manager
        nodes.startup_nodes = dict(random.sample(list(nodes.startup_nodes.items()), len(nodes.startup_nodes)))

    def primaries(self) -> Sequence[Mapping[str, Any]]:
        return [{"target_nodes": node} for node in self._nodes_with_keys()]

    def probe_tags(self) -> Sequence[str]:
        tags: dict[str, str] = {}
        num_nodes = len(self._nodes_with_keys())
        for number in range(MAX_PROBE_TAGS):
            tag = f"{PROBE_TAG}:{number}"
            node = self._cluster.get_node_from_key(tag)
            if node is not None:
                tags.setdefault(node.name, tag)
            if len(tags) == num_nodes:
                break
        return tuple(tags.values())

    async def close(self) -> None:
        await self._cluster.aclose()
        # After a fault it counts as not yet connected, and leaves connections open.
        nodes = self._cluster.nodes_manager
        for attribute in ("nodes_cache", "startup_nodes"):
            with contextlib.suppress(OSError, redis.exceptions.RedisError):
                await nodes.aclose(attribute)

    def _nodes_with_keys(self) -> list[ClusterNode]:
        nodes = {owners[0].name: owners[0] for owners in self._cluster.nodes_manager.slots_cache.values()}
        return list(nodes.values())


class _KeysOfCommands:
    """redis-py's asks the server about each command there is: to read the answer holds the loop."""

    async def initialize(self, node: ClusterNode | None = None) -> None:
        """Knows all that it will know."""

    async def get_keys(self, *command: Any) -> Sequence[Any]:
        first = command.index("STREAMS") + 1 if command[0] == "XREAD" else 1
        return command[first : first + 1]


def _credentials(target: RedisTarget) -> dict[str, Any]:
    return {"username": target.username, "password": target.password}


def _options(target: RedisTarget, tls: RedisTLS | None) -> dict[str, Any]:
    options = {name: value for name, value in target.options.items() if name not in TLS_OPTIONS}
    if tls is not None:
        options["tls"] = tls
    if target.scheme != "unix":
        options["socket_keepalive"] = True
    return {**options, "protocol": 2, "socket_timeout": None}


def _once_more() -> Retry:
    return Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
