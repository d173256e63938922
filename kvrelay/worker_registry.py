"""Which processes are alive: leases in Redis with instance ids, and a view of them that outlives Redis. Knows no session or load.

Leases end by Redis's clock, so a process whose clock jumps neither loses its lease nor keeps a dead one. A view keeps a member
whose lease vanished without being withdrawn for half a lease more: Redis may have lost it, and the next renewal brings it back.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum

import structlog

from kvrelay.errors import StoreFullError, UnavailableError, UnreadableStateError
from kvrelay.redis_connection import RedisConnection

# One hash tag: all keys lie in one slot of a cluster.
_KEYS = ["kvrelay:{registry}:leases", "kvrelay:{registry}:members", "kvrelay:{registry}:withdrawn"]
_RETRY_S = 0.05

_log = structlog.get_logger(__name__)


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
        self._connection = connection
        self._lease_ms = lease_ms

    @asynccontextmanager
    async def lease(self, member: Member) -> AsyncIterator[None]:
        """`async with registry.lease(member):` holds the lease; leaving withdraws it.

        Entering does not fail when Redis is away: the lease is written as soon as it is back.
        """
        renewed = await self._renew(member)
        renewal = asyncio.create_task(self._keep_renewing(member, renewed), name=f"lease of {member.instance_id}")
        try:
            yield
        finally:
            # Awaited, so that no renewal is under way when the lease is withdrawn.
            await _end(renewal)
            with contextlib.suppress(UnavailableError, UnreadableStateError):  # then it runs out on its own
                await self._connection.run_script("withdraw", _KEYS, (member.instance_id, 10 * self._lease_ms))

    @asynccontextmanager
    async def watch(
        self, interval_ms: int = 100, on_change: Callable[[tuple[Member, ...]], None] | None = None
    ) -> AsyncIterator["MemberView"]:
        """`async with registry.watch() as view:` keeps a view of the members up to date.

        Args:
            interval_ms: between two looks.
            on_change: called on the loop with all members whenever they change; must not raise.
        """
        view = MemberView(self._lease_ms / 2000, on_change)
        await self._look(view)
        watcher = asyncio.create_task(self._keep_looking(view, interval_ms / 1000), name="watch of members")
        try:
            yield view
        finally:
            await _end(watcher)

    async def read_members(self) -> tuple[Member, ...]:
        """Looks once. By role, then instance id.

        Raises:
            UnavailableError: Redis does not answer.
        """
        return (await self._read())[0]

    async def _read(self) -> tuple[tuple[Member, ...], frozenset[str]]:
        """Members with a lease, and the instance ids of those that withdrew lately."""
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
        return True  # what is wrong with the registry's keys does not go away at once: again after the usual time

    async def _keep_renewing(self, member: Member, renewed: bool) -> None:
        while True:
            if renewed:
                # Jitter, so that the processes of a cluster do not renew in step.
                await asyncio.sleep(self._lease_ms / 3000 * random.uniform(0.8, 1.0))
            else:
                await asyncio.sleep(_RETRY_S)
                await self._connection.health.wait_until_healthy()
            try:
                renewed = await self._renew(member)
            except Exception as failure:
                _log.error("the lease cannot be renewed", instance_id=member.instance_id, reason=repr(failure))
                renewed = True  # after the usual time: what is wrong here does not go away at once

    async def _look(self, view: "MemberView") -> None:
        try:
            view.update(*await self._read(), now=asyncio.get_running_loop().time())
        except UnavailableError:
            pass  # the last known members stay
        except UnreadableStateError as failure:
            _log.error("the registry cannot be read", reason=repr(failure.__cause__))

    async def _keep_looking(self, view: "MemberView", interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._look(view)
            except Exception as failure:
                _log.error("the registry cannot be read", reason=repr(failure))


class MemberView:
    """The members, as last known. While Redis is away nobody joins and nobody leaves.

    Args:
        grace_s: how long a member is kept whose lease vanished without being withdrawn, from the first look that misses it: while
            Redis was away, leases ran out that are renewed when it is back.
        on_change: called with all members whenever they change.
    """

    def __init__(self, grace_s: float, on_change: Callable[[tuple[Member, ...]], None] | None = None) -> None:
        self._grace_s = grace_s
        self._on_change = on_change
        self._missing_since: dict[str, float] = {}
        self._members: tuple[Member, ...] = ()
        self._looked = asyncio.Event()
        # Replaced with every change, so that each reader of `changes` waits for the one after what it saw.
        self._changed = asyncio.Event()

    def members(self, role: MemberRole | None = None) -> tuple[Member, ...]:
        """The members of a role, or all; by role, then instance id."""
        return tuple(member for member in self._members if role is None or member.role is role)

    async def changes(self) -> AsyncIterator[tuple[Member, ...]]:
        """All members now, then again after every change. A slow reader sees the latest, not each."""
        while True:
            changed = self._changed
            yield self._members
            await changed.wait()

    async def wait_until_looked(self, timeout_ms: int) -> bool:
        """Waits until Redis was read once; False when that took too long."""
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                await self._looked.wait()
        except TimeoutError:
            return False
        return True

    def update(self, alive: tuple[Member, ...], withdrawn: frozenset[str], now: float) -> None:
        """Takes over what a look has found at a time in monotonic seconds."""
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
    """None for what another version of kvrelay wrote: it must not stop the watch."""
    try:
        values = json.loads(payload)
        names = [field.name for field in dataclasses.fields(Member)]
        known = {name: str(values[name]) for name in names if name in values}
        return Member(**{**known, "role": MemberRole(known["role"])})  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError, RecursionError):
        _log.warning("unreadable member in the registry", payload=payload[:200])
        return None
