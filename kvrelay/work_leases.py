"""Which session each work belongs to, when its deadline passes, and which attempt of a request is the newest.

Lives on a worker's event loop. Knows nothing of what works are made of.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvrelay.work import WorkId

SessionT = TypeVar("SessionT")

NUM_REMEMBERED_REQUESTS = 16384
"""So many requests' newest attempts are remembered after their end, to refuse older ones that arrive late."""


@dataclass(slots=True)
class _Lease(Generic[SessionT]):
    session: SessionT
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Attempt:
    """The newest attempt at a request, and its works that have been here: each may come once."""

    number: int
    works: set[WorkId] = field(default_factory=set)


class WorkLeases(Generic[SessionT]):
    """All works of a worker.

    Args:
        on_expired: called when a work's deadline has passed; the lease stays until `end`.
        on_superseded: called when a newer attempt takes over from a work; its lease has ended.
    """

    def __init__(self, on_expired: Callable[[WorkId], None], on_superseded: Callable[[WorkId], None]) -> None:
        self._on_expired = on_expired
        self._on_superseded = on_superseded
        self._leases: dict[WorkId, _Lease[SessionT]] = {}
        self._works_by_request: dict[str, set[WorkId]] = {}
        self._newest_attempts: OrderedDict[str, _Attempt] = OrderedDict()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._leases)

    def begin(self, work_id: WorkId, session: SessionT, deadline_ms: int) -> bool:
        """Takes a work on, and ends those of older attempts at the same request.

        Returns:
            False when the work was known before, or a newer attempt is: then it is to be refused.
        """
        newest = self._newest_attempts.get(work_id.request_id)
        if newest is not None and (work_id.attempt < newest.number or work_id in newest.works):
            return False
        if newest is None or work_id.attempt > newest.number:
            newest = self._supersede(work_id)
        newest.works.add(work_id)
        timer = asyncio.get_running_loop().call_later(deadline_ms / 1000, self._on_expired, work_id)
        self._leases[work_id] = _Lease(session, timer)
        self._works_by_request.setdefault(work_id.request_id, set()).add(work_id)
        self._empty.clear()
        return True

    def session_of(self, work_id: WorkId) -> SessionT | None:
        """Whose work it is; None when it has ended."""
        lease = self._leases.get(work_id)
        return None if lease is None else lease.session

    def works(self) -> list[WorkId]:
        """All works."""
        return list(self._leases)

    def end(self, work_id: WorkId) -> bool:
        """Ends a work's lease; False when it had ended before."""
        lease = self._leases.pop(work_id, None)
        if lease is None:
            return False
        lease.timer.cancel()
        siblings = self._works_by_request[work_id.request_id]
        siblings.discard(work_id)
        if not siblings:
            del self._works_by_request[work_id.request_id]
        if not self._leases:
            self._empty.set()
        return True

    def end_session(self, session: SessionT) -> list[WorkId]:
        """Ends the leases of all works of a session, and says which they were."""
        ended = [work_id for work_id, lease in self._leases.items() if lease.session is session]
        for work_id in ended:
            self.end(work_id)
        return ended

    async def wait_until_empty(self) -> None:
        """Returns when no work is left. The caller bounds it."""
        await self._empty.wait()

    def _supersede(self, work_id: WorkId) -> "_Attempt":
        newest = self._newest_attempts[work_id.request_id] = _Attempt(work_id.attempt)
        self._newest_attempts.move_to_end(work_id.request_id)
        while len(self._newest_attempts) > NUM_REMEMBERED_REQUESTS:
            self._newest_attempts.popitem(last=False)
        for older in list(self._works_by_request.get(work_id.request_id, ())):
            self.end(older)
            self._on_superseded(older)
        return newest
