"""Leases of live processes in Redis, and a view of them that outlives Redis.

Leases end by Redis's clock. Redis may lose one: a view keeps its member for half a lease.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import StoreFullError, UnavailableError, UnreadableStateError
from kvrelay.state.redis_connection import RedisConnection

# One hash tag puts all keys into one slot of a cluster.
_KEYS = ["kvrelay:{registry}:leases", "kvrelay:{registry}:members", "kvrelay:{registry}:withdrawn"]
_RETRY_S = 0.05

_log = structlog.get_logger(__name__)


class MemberRegistry:
    """Leases are renewed every third of `lease_ms`."""

    def __init__(self, connection: RedisConnection, lease_ms: int = 6000) -> None:
        self._connection = connection
        self._lease_ms = lease_ms

    @asynccontextmanager
    async def lease(self, member: Member) -> AsyncIterator[None]:
        """Holds the lease within the block. It is written later if Redis is away."""
        renewed = await self._renew(member)
        renewal = asyncio.create_task(self._keep_renewing(member, renewed), name=f"lease of {member.instance_id}")
        try:
            yield
        finally:
            # Wait, so that no renewal is under way when the lease is withdrawn.
            await _end(renewal)
            # If this fails, the lease expires.
            with contextlib.suppress(UnavailableError, UnreadableStateError):
                await self._connection.run_script("withdraw", _KEYS, (member.instance_id, 10 * self._lease_ms))

    @asynccontextmanager
    async def watch(
        self, interval_ms: int = 250, on_change: Callable[[tuple[Member, ...]], None] | None = None
    ) -> AsyncIterator["MemberView"]:
        """Keeps a view up to date within the block."""
        view = self.new_view(on_change)
        await self.look(view)
        watcher = asyncio.create_task(self._keep_looking(view, interval_ms / 1000), name="watch of members")
        try:
            yield view
        finally:
            await _end(watcher)

    def new_view(self, on_change: Callable[[tuple[Member, ...]], None] | None = None) -> "MemberView":
        """Empty until `look`."""
        return MemberView(self._lease_ms / 2000, on_change)

    async def look(self, view: "MemberView") -> None:
        """While Redis is away, the last known members stay."""
        try:
            view.update(*await self._read(), now=asyncio.get_running_loop().time())
        except UnavailableError:
            pass
        except UnreadableStateError as failure:
            _log.error("the registry cannot be read", reason=repr(failure.__cause__))

    async def read_members(self) -> tuple[Member, ...]:
        """Sorted by role, then instance id. Raises UnavailableError."""
        return (await self._read())[0]

    async def _read(self) -> tuple[tuple[Member, ...], frozenset[str]]:
        """Members with a lease, and instance ids that withdrew lately."""
        payloads, withdrawn = await self._connection.run_script("members", _KEYS, ())
        members = (_decode(payload) for payload in payloads)
        alive = sorted((member for member in members if member is not None), key=_order)
        return tuple(alive), frozenset(instance_id.decode(errors="replace") for instance_id in withdrawn)

    async def _renew(self, member: Member) -> bool:
        try:
            await self._connection.run_script("lease", _KEYS, (member.instance_id, _encode(member), self._lease_ms))
        except (UnavailableError, StoreFullError):
            return False
        except UnreadableStateError as failure:
            _log.error("the lease cannot be renewed", instance_id=member.instance_id, reason=repr(failure.__cause__))
        return True  # wrong keys stay wrong for a while: try again after the usual time

    async def _keep_renewing(self, member: Member, renewed: bool) -> None:
        while True:
            if renewed:
                # Jitter keeps the processes of a cluster from renewing in step.
                await asyncio.sleep(self._lease_ms / 3000 * random.uniform(0.8, 1.0))
            else:
                await asyncio.sleep(_RETRY_S)
                await self._connection.health.wait_until_healthy()
            try:
                renewed = await self._renew(member)
            except Exception as failure:
                _log.error("the lease cannot be renewed", instance_id=member.instance_id, reason=repr(failure))
                renewed = True  # try again after the usual time

    async def _keep_looking(self, view: "MemberView", interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.look(view)
            except Exception as failure:
                _log.error("the registry cannot be read", reason=repr(failure))


class MemberView:
    """The last known members. While Redis is away, none joins or leaves.

    `grace_s` is how long a member without lease is kept, from the first read that misses it.
    `on_change` gets all members on the loop after each change; it must not raise.
    """

    def __init__(self, grace_s: float, on_change: Callable[[tuple[Member, ...]], None] | None = None) -> None:
        self._grace_s = grace_s
        self._on_change = on_change
        self._missing_since: dict[str, float] = {}
        self._members: tuple[Member, ...] = ()
        self._looked = asyncio.Event()
        # Replaced at every change: each reader of `changes` waits for the one after what it saw.
        self._changed = asyncio.Event()

    def members(self, role: MemberRole | None = None) -> tuple[Member, ...]:
        return tuple(member for member in self._members if role is None or member.role is role)

    async def changes(self) -> AsyncIterator[tuple[Member, ...]]:
        """All members now and after each change. A slow reader skips to the latest."""
        while True:
            changed = self._changed
            yield self._members
            await changed.wait()

    async def wait_until_looked(self, timeout_ms: int) -> bool:
        """Waits for the first read of Redis; False on timeout."""
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._looked.wait()
        except TimeoutError:
            return False
        return True

    def update(self, alive: tuple[Member, ...], withdrawn: frozenset[str], now: float) -> None:
        """`now` is in monotonic seconds."""
        self._looked.set()
        known = withdrawn | {member.instance_id for member in alive}
        missing = [member for member in self._members if member.instance_id not in known]
        self._missing_since = {each.instance_id: self._missing_since.get(each.instance_id, now) for each in missing}
        kept = [member for member in missing if now - self._missing_since[member.instance_id] < self._grace_s]
        members = tuple(sorted([*alive, *kept], key=_order))
        if members == self._members:
            return
        self._members = members
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self._on_change is not None:
            self._on_change(members)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _order(member: Member) -> tuple[str, str]:
    return member.role.value, member.instance_id


def _encode(member: Member) -> str:
    values = dataclasses.asdict(member)
    return json.dumps({**values, "role": member.role.value})


def _decode(payload: bytes) -> Member | None:
    """None for an entry of another kvrelay version, which must not stop the watch."""
    try:
        values = json.loads(payload)
        names = [field.name for field in dataclasses.fields(Member)]
        known = {name: str(values[name]) for name in names if name in values}
        return Member(**{**known, "role": MemberRole(known["role"])})  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, RecursionError):
        _log.warning("unreadable member in the registry", payload=payload[:200])
        return None
