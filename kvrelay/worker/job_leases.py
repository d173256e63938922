"""Sessions, deadlines, attempts and owners of jobs. Lives on a worker's event loop.

    a request's next job comes from        it begins
    the gateway that had the last one      with a newer attempt
    another gateway                        with a newer attempt, when no job of the request is left
                                           else once Redis has said that it owns the request

Attempts far ahead need Redis's word too, so that no number shuts a request out.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Generic, TypeVar

from kvrelay.core.job import JobId

SessionT = TypeVar("SessionT")

NUM_REMEMBERED_REQUESTS = 16384
"""Newest attempts outlive their jobs, to refuse late older ones."""
MAX_ATTEMPT_JUMP = 1000
"""How far an attempt may be ahead of the last known one without Redis's word."""


class Claim(Enum):
    BEGUN = auto()
    SUPERSEDED = auto()
    """The job, or a newer attempt, was here before."""
    UNPROVEN = auto()
    """Only the request's owner by Redis may begin it."""


@dataclass(slots=True)
class _Lease(Generic[SessionT]):
    session: SessionT
    timer: asyncio.TimerHandle


@dataclass(slots=True)
class _Request:
    """The newest attempt; each of its jobs may come once."""

    gateway_id: str
    attempt: int
    jobs: set[JobId] = field(default_factory=set)


class JobLeases(Generic[SessionT]):
    """All jobs of a worker.

    Args:
        on_expired: called after a job's deadline; the lease stays until `end`.
        on_superseded: gets a job whose lease a newer attempt has ended, and the job's session; None
            where the newer attempt came over the same one.
    """

    def __init__(
        self, on_expired: Callable[[JobId], None], on_superseded: Callable[[JobId, SessionT | None], None]
    ) -> None:
        self._on_expired = on_expired
        self._on_superseded = on_superseded
        self._leases: dict[JobId, _Lease[SessionT]] = {}
        self._num_jobs: Counter[SessionT] = Counter()
        self._jobs_by_request: dict[str, set[JobId]] = {}
        self._requests: OrderedDict[str, _Request] = OrderedDict()
        self._ending: set[JobId] = set()
        """Without a lease, and perhaps still in the engine."""
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._leases)

    def begin(
        self, job_id: JobId, session: SessionT, gateway_id: str, deadline_ms: int, *, owns_request: bool = False
    ) -> Claim:
        """Ends older attempts. `owns_request`: Redis says that the request is this gateway's."""
        known = self._requests.get(job_id.request_id)
        if not owns_request and self._needs_proof(job_id, gateway_id, known):
            return Claim.UNPROVEN
        is_same = known is not None and known.gateway_id == gateway_id
        if job_id in self._leases or job_id in self._ending:
            return Claim.SUPERSEDED
        if known is not None and is_same and (job_id.attempt < known.attempt or job_id in known.jobs):
            return Claim.SUPERSEDED
        if known is None or not is_same or job_id.attempt > known.attempt:
            known = self._supersede(job_id, session, gateway_id)
        known.jobs.add(job_id)
        timer = asyncio.get_running_loop().call_later(deadline_ms / 1000, self._on_expired, job_id)
        self._leases[job_id] = _Lease(session, timer)
        self._num_jobs[session] += 1
        self._jobs_by_request.setdefault(job_id.request_id, set()).add(job_id)
        self._empty.clear()
        return Claim.BEGUN

    def session_of(self, job_id: JobId) -> SessionT | None:
        lease = self._leases.get(job_id)
        return None if lease is None else lease.session

    def num_jobs_of(self, session: SessionT) -> int:
        return self._num_jobs[session]

    def jobs(self) -> list[JobId]:
        return list(self._leases)

    def release(self, job_id: JobId) -> None:
        """Ends the lease of a job that the engine still has: `end` follows once it has let go."""
        if self._drop(job_id):
            self._ending.add(job_id)

    def end(self, job_id: JobId) -> bool:
        """The engine has nothing of the job. False when its lease had ended before."""
        self._ending.discard(job_id)
        return self._drop(job_id)

    def end_session(self, session: SessionT) -> list[JobId]:
        ended = [job_id for job_id, lease in self._leases.items() if lease.session is session]
        for job_id in ended:
            self.release(job_id)
        return ended

    async def wait_until_empty(self) -> None:
        """The caller sets the timeout."""
        await self._empty.wait()

    def _needs_proof(self, job_id: JobId, gateway_id: str, known: _Request | None) -> bool:
        if known is None:
            return job_id.attempt > MAX_ATTEMPT_JUMP
        if job_id.attempt > known.attempt + MAX_ATTEMPT_JUMP:
            return True
        is_open = job_id.request_id in self._jobs_by_request
        return known.gateway_id != gateway_id and (is_open or job_id.attempt <= known.attempt)

    def _supersede(self, job_id: JobId, successor: SessionT, gateway_id: str) -> _Request:
        known = self._requests[job_id.request_id] = _Request(gateway_id, job_id.attempt)
        self._requests.move_to_end(job_id.request_id)
        while len(self._requests) > NUM_REMEMBERED_REQUESTS:
            self._requests.popitem(last=False)
        for older in sorted(
            self._jobs_by_request.get(job_id.request_id, ()), key=lambda each: (each.attempt, each.first_sequence)
        ):
            session = self._leases[older].session
            self.release(older)
            self._on_superseded(older, None if session is successor else session)
        return known

    def _drop(self, job_id: JobId) -> bool:
        lease = self._leases.pop(job_id, None)
        if lease is None:
            return False
        lease.timer.cancel()
        self._num_jobs[lease.session] -= 1
        if not self._num_jobs[lease.session]:
            del self._num_jobs[lease.session]
        siblings = self._jobs_by_request[job_id.request_id]
        siblings.discard(job_id)
        if not siblings:
            del self._jobs_by_request[job_id.request_id]
        if not self._leases:
            self._empty.set()
        return True
