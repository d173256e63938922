"""How many retries a gateway may afford: a token bucket that requests fill. Pure; callers tell the time in monotonic seconds.

When everything fails, retrying everything makes it worse. Each request pays for a part of a retry; when the bucket is empty,
requests wait instead of burning attempts. Not paid for: what a dead, full or draining worker causes, for such a worker is not
asked again and the request goes elsewhere or waits anyway.
"""

RETRIES_PER_REQUEST = 0.1
RETRIES_PER_S = 0.2
"""So that a request that waits gets its turn where no other comes."""
FIRST_RETRIES = 5.0
MOST_RETRIES = 50.0


class RetryBudget:
    """One gateway's."""

    def __init__(self, now: float) -> None:
        self._num_left = FIRST_RETRIES
        self._last_time = now

    def note_request(self) -> None:
        """A request was admitted."""
        self._num_left = min(self._num_left + RETRIES_PER_REQUEST, MOST_RETRIES)

    def can_afford(self, now: float) -> bool:
        """Whether there is a retry left."""
        self._num_left = min(self._num_left + RETRIES_PER_S * (now - self._last_time), MOST_RETRIES)
        self._last_time = now
        return self._num_left >= 1.0

    def spend(self) -> None:
        """A retry goes to a worker."""
        assert self._num_left >= 1.0, "asked before"
        self._num_left -= 1.0
