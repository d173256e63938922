"""A token bucket of retries, which requests fill. Pure; times are monotonic seconds.

When everything fails, retries make it worse. A retry after a dead, full or draining worker is free.
"""

RETRIES_PER_REQUEST = 0.1
RETRIES_PER_S = 0.2
"""Serves a waiting request even if no other comes."""
INITIAL_RETRIES = 5.0
MAX_RETRIES = 50.0


class RetryBudget:
    def __init__(self, now: float) -> None:
        self._num_left = INITIAL_RETRIES
        self._last_time = now

    def on_request(self) -> None:
        self._num_left = min(self._num_left + RETRIES_PER_REQUEST, MAX_RETRIES)

    def try_acquire(self, now: float) -> bool:
        self._num_left = min(self._num_left + RETRIES_PER_S * (now - self._last_time), MAX_RETRIES)
        self._last_time = now
        if self._num_left < 1.0:
            return False
        self._num_left -= 1.0
        return True

    def refund(self) -> None:
        """The retry was not made: no worker could take it."""
        self._num_left += 1.0
