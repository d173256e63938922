"""A bounded way to Redis or Valkey: every command has a time limit, and none is sent while Redis is known to be away.

Shared by the state store and the worker registry of a process. Knows nothing of requests or workers.
"""


class StoreHealth:
    """A breaker. It opens with the first failure and closes with the first ping that is answered."""

    @property
    def healthy(self) -> bool:
        """False while the breaker is open."""
        raise NotImplementedError

    async def wait_until_healthy(self) -> None:
        """Returns at once while the breaker is closed, else when it closes. Not bounded: for background work only."""
        raise NotImplementedError


class RedisConnection:
    """Connections to one Redis. `async with RedisConnection(url) as redis: ...`

    Args:
        url: redis://, rediss:// or unix://.
        timeout_ms: most time for one operation.
    """

    def __init__(self, url: str, timeout_ms: int = 200) -> None:
        raise NotImplementedError

    @property
    def health(self) -> StoreHealth:
        """The breaker of these connections."""
        raise NotImplementedError

    async def close(self) -> None:
        """Closes all connections. Idempotent."""
        raise NotImplementedError
