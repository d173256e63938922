"""Which gateway has a request. Workers read no more of it, and may read no more, in Redis."""

from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_examination import execute
from kvrelay.state.state_store import owner_key


class RequestOwners:
    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def owner_of(self, request_id: str) -> str | None:
        """A gateway id; None for an unknown request. Raises as `RedisConnection.run`."""
        key = owner_key(request_id)
        # No script: one needs the right to write its keys.
        gateway_id: bytes | None = await self._connection.run(lambda client: execute(client, "HGET", key, "gateway_id"))
        return None if gateway_id is None else gateway_id.decode(errors="replace")
