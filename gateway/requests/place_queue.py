"""Requests that wait for a place while the gateway is full, by tenant. Pure."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.requests.key_limits import Caller
from kvrelay.core.fair_turns import FairTurns


@dataclass(slots=True, eq=False)
class Waiting:
    caller: Caller
    wake: Callable[[], None]
    """Called once: it has a place, or was pushed out."""
    has_place: bool = False


class PlaceQueue:
    """Freed places go to tenants in turn, by weight; within one the first come are first."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._turns = FairTurns()
        self._waiting: dict[str, deque[Waiting]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, caller: Caller, wake: Callable[[], None]) -> Waiting | None:
        """Returns None if there is no room for this tenant.

        A full queue gives a tenant room by pushing out the last of the tenant with the most.
        """
        num_own = len(self._waiting.get(caller.share, ()))
        if self._num_waiting >= self._max_waiting:
            longest = max(self._waiting.values(), key=len, default=None)
            if longest is None or len(longest) <= num_own + 1:
                return None
            pushed_out = longest[-1]
            self.remove(pushed_out)
            pushed_out.wake()
        waiting = Waiting(caller, wake)
        self._waiting.setdefault(caller.share, deque()).append(waiting)
        self._turns.join(caller.share)
        self._num_waiting += 1
        return waiting

    def give_place(self, may_have: Callable[[Caller], bool]) -> Waiting | None:
        """Takes out the next one whose key `may_have` another place; the caller wakes it."""
        for share in self._turns.in_order():
            for waiting in self._waiting[share]:
                if may_have(waiting.caller):
                    self._turns.charge(share, 1, waiting.caller.limits.weight)
                    self.remove(waiting)
                    return waiting
        return None

    def remove(self, waiting: Waiting) -> None:
        """Idempotent."""
        own = self._waiting.get(waiting.caller.share)
        if own is None or waiting not in own:
            return
        own.remove(waiting)
        self._num_waiting -= 1
        if not own:
            del self._waiting[waiting.caller.share]
            self._turns.leave(waiting.caller.share)
