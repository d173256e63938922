"""A budget that refills with time. Pure; times are monotonic seconds."""

import math


class TokenBucket:
    """Holds at most what refills in a minute.

    May be overdrawn, because costs are often known only afterwards.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._updated_at = now

    @property
    def per_minute(self) -> int:
        return self._per_minute

    def set_rate(self, per_minute: int, now: float) -> None:
        """Keeps the debt."""
        self._refill(now)
        self._per_minute = per_minute
        self._level = min(self._level, float(per_minute))

    def take(self, number: int = 1) -> None:
        self._level -= number

    def seconds_until(self, wanted: int, now: float) -> float:
        """0.0 if `wanted` are there, infinity if they never will be."""
        self._refill(now)
        missing = max(wanted - self._level, 0.0)
        if not missing:
            return 0.0
        return missing * 60 / self._per_minute if self._per_minute else math.inf

    def missing(self, now: float) -> int:
        self._refill(now)
        return math.ceil(self._per_minute - self._level)

    def is_full(self, now: float) -> bool:
        self._refill(now)
        return self._level >= self._per_minute

    def _refill(self, now: float) -> None:
        added = (now - self._updated_at) * self._per_minute / 60
        self._level = min(self._level + added, float(self._per_minute))
        self._updated_at = now
