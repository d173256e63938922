"""Which addresses belong to workers of the cluster: no worker dials another one.

Reads the registry when it is asked, at most once in MIN_READ_INTERVAL_S. While Redis is away, the
last known members count.
"""

import asyncio

from kvrelay.core.member import MemberRole
from kvrelay.state.member_registry import MemberRegistry

MAX_AGE_S = 10.0
"""A known address counts for this long before the registry is read again, behind the answer."""
MIN_READ_INTERVAL_S = 0.05


class RegisteredPeers:
    def __init__(self, registry: MemberRegistry) -> None:
        self._registry = registry
        self._view = registry.new_view()
        self._read_at: float | None = None
        self._reading: asyncio.Task[None] | None = None

    async def is_registered(self, role: MemberRole, address: str) -> bool:
        if not self._is_known(role, address):
            await asyncio.shield(self._read())
            return self._is_known(role, address)
        if self._read_at is None or asyncio.get_running_loop().time() - self._read_at > MAX_AGE_S:
            self._read()
        return True

    def _is_known(self, role: MemberRole, address: str) -> bool:
        return any(member.address == address for member in self._view.members(role))

    def _read(self) -> asyncio.Task[None]:
        """All who ask meanwhile share one read."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_once(), name="read of the registry")
        return self._reading

    async def _read_once(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self._read_at is not None:
                await asyncio.sleep(max(0.0, self._read_at + MIN_READ_INTERVAL_S - loop.time()))
            await self._registry.look(self._view)
            self._read_at = loop.time()
        finally:
            self._reading = None
