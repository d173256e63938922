"""How much a worker is given before it has shown that it works: slow start, and a breaker with a half-open probe. Pure.

    new session   FIRST_WINDOW works at a time, one more for each that succeeds, without bound from OPEN_WINDOW on
    breaker       after so many failures in a row nothing for a while, then one work as a probe, then as a new session

So a worker that comes after an outage is not buried under all that waited, and one that fails everything is left alone.
Times are monotonic seconds, given by the caller.
"""

import random
from collections.abc import Callable

from kvrelay.backoff import Backoff

FIRST_WINDOW = 8
OPEN_WINDOW = 16
FAILURES_TO_OPEN_BREAKER = 3
FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0


class WorkerIntake:
    """One session's.

    Args:
        draw: for the jitter of rests, from [0, 1).
    """

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self._window: int | None = FIRST_WINDOW
        self._unproven: set[str] = set()
        self._num_failures = 0
        self._rests_until = 0.0
        self._rests = Backoff(FIRST_REST_S, LONGEST_REST_S, draw)

    def may_take(self, now: float) -> bool:
        """Whether the worker may be given one more request now."""
        return now >= self._rests_until and (self._window is None or len(self._unproven) < self._window)

    def begin(self, request_id: str) -> None:
        """It is given a request."""
        self._unproven.add(request_id)

    def end(self, request_id: str) -> None:
        """The request was given up, or goes elsewhere; that says nothing about the worker."""
        self._unproven.discard(request_id)

    def note_success(self, request_id: str) -> int:
        """It did its part. How many more requests it may be given because of that."""
        self._unproven.discard(request_id)
        self._num_failures = 0
        if self._window is None:
            return 0
        self._rests.reset()
        self._window += 1
        if self._window >= OPEN_WINDOW:
            self._window = None
            return OPEN_WINDOW
        return 2

    def note_failure(self, request_id: str, now: float) -> None:
        """It failed at the request by a defect of its own."""
        self._unproven.discard(request_id)
        self._num_failures += 1
        is_probe = self._window is not None and self._window < FIRST_WINDOW
        if is_probe or self._num_failures >= FAILURES_TO_OPEN_BREAKER:
            self._rests_until = now + self._rests.next_delay_s()
            self._window = 1
