"""Pushes only to decode workers of the cluster: an address that a gateway names proves nothing."""

from collections.abc import Awaitable, Callable

from kvrelay.core.quoting import quoted
from kvrelay.errors import TransferError
from kvrelay.kv_transfer.transports import KVPush, KVTransport, PushPlan


class RegisteredReceivers:
    """A transport that asks before it opens a connection. Its owner closes `transport`."""

    def __init__(self, transport: KVTransport, is_registered: Callable[[str], Awaitable[bool]]) -> None:
        self._transport = transport
        self._is_registered = is_registered

    async def open(self, address: str, plan: PushPlan) -> KVPush:
        """Raises TransferError, also for an address of no registered decode worker."""
        if not await self._is_registered(address):
            raise TransferError(
                f"no decode worker is registered at {quoted(address)}, so nothing is pushed there;"
                " give that worker --advertise-address"
            )
        return await self._transport.open(address, plan)

    async def close(self) -> None:
        await self._transport.close()
