"""Grants and revokes the right of one push to write into one reservation. Thread-safe.

granted ----start_write----> writing ----finish_write----> gone
  |                            |
revoke                       revoke: its blocks are free only after `finish_write`
  |                            |
gone                         revoked ----finish_write----> gone
"""

import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.core.job import Job, JobId
from kvrelay.errors import TicketError
from kvrelay.kv_transfer.codec import TICKET_BYTES


class _State(Enum):
    GRANTED = auto()
    WRITING = auto()
    REVOKED = auto()


@dataclass(slots=True, eq=False)
class WriteGrant:
    """The right to write KV of tokens [token_begin, token_end) into `block_ids`, once."""

    job: Job
    block_ids: tuple[int, ...]
    token_begin: int
    ticket: bytes
    _state: _State = _State.GRANTED
    _on_revoked: Callable[[], None] | None = None

    @property
    def token_end(self) -> int:
        return len(self.job.token_ids)


class WriteGrants:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grants: dict[JobId, WriteGrant] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def grant(self, job: Job, block_ids: tuple[int, ...], token_begin: int) -> bytes:
        """Returns the ticket that the writer must show."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            assert job.job_id not in self._grants, "one grant for each reservation"
            self._grants[job.job_id] = WriteGrant(job, block_ids, token_begin, ticket)
        return ticket

    def start_write(self, job_id: JobId, ticket: bytes, on_revoked: Callable[[], None]) -> WriteGrant:
        """`finish_write` must follow. `on_revoked` is called in any thread and must not block.

        Raises:
            TicketError: the ticket is wrong or used, or there is no such reservation.
        """
        with self._lock:
            grant = self._grants.get(job_id)
            # Always compared, so that the time taken does not tell whether the grant exists.
            matches = hmac.compare_digest(grant.ticket if grant is not None else bytes(TICKET_BYTES), ticket)
            if grant is None or not matches or grant._state is not _State.GRANTED:
                raise TicketError("the ticket is unknown, used, or of a reservation that has ended")
            grant._state = _State.WRITING
            grant._on_revoked = on_revoked
            return grant

    def finish_write(self, grant: WriteGrant) -> None:
        with self._lock:
            self._grants.pop(grant.job.job_id, None)

    def is_unused(self, job_id: JobId) -> bool:
        with self._lock:
            grant = self._grants.get(job_id)
            return grant is not None and grant._state is _State.GRANTED

    def revoke(self, job_id: JobId) -> bool:
        """True: free the blocks. False: wait for the writer's `finish_write`."""
        with self._lock:
            grant = self._grants.get(job_id)
            if grant is None:
                return True
            if grant._state is _State.GRANTED:
                del self._grants[job_id]
                return True
            on_revoked = grant._on_revoked if grant._state is _State.WRITING else None
            grant._state = _State.REVOKED
        if on_revoked is not None:
            on_revoked()
        return False
