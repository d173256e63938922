"""Who may write into which reservation, and whether somebody does: the meeting point of the engine thread and the receiver.

    open ----begin----> writing ----end----> gone
      |                    |
    close                close: told to stop; its blocks are free only after `end`
      |                    |
    gone                closed ----end----> gone

Thread-safe. Knows nothing of what is written.
"""

import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.errors import TicketError
from kvrelay.kv_transfer.codec import TICKET_BYTES
from kvrelay.work import Work, WorkId


class _State(Enum):
    OPEN = auto()
    WRITING = auto()
    CLOSED = auto()


@dataclass(slots=True, eq=False)
class PushPermit:
    """The right to write the KV of tokens [token_begin, len(work.token_ids)) into `block_ids`, once."""

    work: Work
    block_ids: tuple[int, ...]
    token_begin: int
    ticket: bytes
    _state: _State = _State.OPEN
    _on_close: Callable[[], None] | None = None

    @property
    def token_end(self) -> int:
        return len(self.work.token_ids)


class PushPermits:
    """All permits of a decode worker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._permits: dict[WorkId, PushPermit] = {}

    def __len__(self) -> int:
        return len(self._permits)

    def open(self, work: Work, block_ids: tuple[int, ...], token_begin: int) -> bytes:
        """Makes a permit for a reservation and returns its ticket: whoever shows it may write."""
        ticket = secrets.token_bytes(TICKET_BYTES)
        with self._lock:
            assert work.work_id not in self._permits, "one permit for each reservation"
            self._permits[work.work_id] = PushPermit(work, block_ids, token_begin, ticket)
        return ticket

    def begin(self, work_id: WorkId, ticket: bytes, on_close: Callable[[], None]) -> PushPermit:
        """Begins to write; `end` must follow.

        Args:
            work_id: whose reservation.
            ticket: as shown by the writer.
            on_close: called, in any thread, when the writer is to stop; must not block.

        Raises:
            TicketError: there is no such reservation, the ticket is not its, or it was used before.
        """
        with self._lock:
            permit = self._permits.get(work_id)
            # Compared even when there is nothing to compare with, so that time tells nothing.
            matches = hmac.compare_digest(permit.ticket if permit is not None else bytes(TICKET_BYTES), ticket)
            if permit is None or not matches or permit._state is not _State.OPEN:
                raise TicketError("the ticket is unknown, used, or of a reservation that has ended")
            permit._state = _State.WRITING
            permit._on_close = on_close
            return permit

    def end(self, permit: PushPermit) -> None:
        """The writer has ended: nothing of it touches the blocks any more."""
        with self._lock:
            self._permits.pop(permit.work.work_id, None)

    def close(self, work_id: WorkId) -> bool:
        """Takes the permit back.

        Returns:
            True when nobody writes, now or later: the blocks may be freed. False when a writer has been told to stop, and its
            end must be waited for.
        """
        with self._lock:
            permit = self._permits.get(work_id)
            if permit is None:
                return True
            if permit._state is _State.OPEN:
                del self._permits[work_id]
                return True
            already_closed = permit._state is _State.CLOSED
            permit._state = _State.CLOSED
            on_close = permit._on_close
        if on_close is not None and not already_closed:
            on_close()
        return False
