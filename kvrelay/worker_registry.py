"""Which processes are alive: leases in Redis with instance ids, and a view of them that outlives Redis. Knows no session and no load.

Leases end by Redis's clock, so a process whose clock jumps neither loses its lease nor keeps a dead one.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum

from kvrelay.redis_connection import RedisConnection


class MemberRole(Enum):
    """What a process does."""

    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Member:
    """A process with a lease. A restarted process is another member."""

    instance_id: str
    role: MemberRole
    address: str
    """host:port."""
    model: str = ""
    """Served model name; empty for gateways."""
    fingerprint: str = ""
    """Of the model; empty for gateways."""


class WorkerRegistry:
    """The registry as one process sees it.

    Args:
        connection: shared with the state store; the registry does not close it.
        lease_ms: how long a member counts as alive after its last renewal; renewed every third of it.
    """

    def __init__(self, connection: RedisConnection, lease_ms: int = 6000) -> None:
        raise NotImplementedError

    def lease(self, member: Member) -> AbstractAsyncContextManager[None]:
        """`async with registry.lease(member):` holds the lease; leaving withdraws it.

        Entering does not fail when Redis is away: the lease is written as soon as it is back.
        """
        raise NotImplementedError

    def watch(
        self, interval_ms: int = 500, on_change: Callable[[tuple[Member, ...]], None] | None = None
    ) -> AbstractAsyncContextManager["MemberView"]:
        """`async with registry.watch() as view:` keeps a view of the members up to date.

        Args:
            interval_ms: between two looks.
            on_change: called on the loop with all members whenever they change; must not raise.
        """
        raise NotImplementedError

    async def read_members(self) -> tuple[Member, ...]:
        """Looks once. By role, then instance id.

        Raises:
            UnavailableError: Redis does not answer.
        """
        raise NotImplementedError


class MemberView:
    """The members, as last known. While Redis is away nobody joins and nobody leaves."""

    def members(self, role: MemberRole | None = None) -> tuple[Member, ...]:
        """The members of a role, or all; by role, then instance id."""
        raise NotImplementedError

    def changes(self) -> AsyncIterator[tuple[Member, ...]]:
        """All members now, then again after every change. A slow reader sees the latest, not each."""
        raise NotImplementedError

    async def wait_until_looked(self, timeout_ms: int) -> bool:
        """Waits until Redis was read once; False when that took too long."""
        raise NotImplementedError
