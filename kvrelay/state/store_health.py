"""A breaker for the state store. Short absences of Redis, normal on a busy machine, are logged once
a minute.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from kvrelay.errors import UnavailableError
from kvrelay.state.redis_faults import RedisFault, fault_of

RETRY_AFTER_MS = 500
NO_ANSWER_MESSAGE = "The state store does not answer; try again in a moment."
LASTS_S = 1.0
"""From this length on, an absence is logged as a warning."""
REPORT_INTERVAL_S = 60.0  # between two lines about moments

_log = structlog.get_logger(__name__)


class StoreHealth:
    """Opens at the first failure; closes when Redis does all that kvrelay needs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, address: str = "") -> None:
        self._clock = clock
        self._about = {"address": address} if address else {}
        self._healthy = asyncio.Event()
        self._healthy.set()
        self._problem: str | None = None
        self._opened_at = 0.0
        self._has_warned = False
        self._num_moments = 0
        self._longest_moment_s = 0.0
        self._reported_at: float | None = None

    @property
    def healthy(self) -> bool:
        return self._healthy.is_set()

    @property
    def problem(self) -> str | None:
        """A sentence without secrets."""
        return self._problem

    async def wait_until_healthy(self) -> None:
        """Unbounded: for background work only."""
        await self._healthy.wait()

    def check(self) -> None:
        """Raises UnavailableError while the breaker is open."""
        if not self.healthy:
            raise UnavailableError(NO_ANSWER_MESSAGE, RETRY_AFTER_MS)

    def open(self, cause: RedisFault | BaseException) -> bool:
        """Opens the breaker; True if it was closed."""
        fault = cause if isinstance(cause, RedisFault) else fault_of(cause)
        sentence = fault.sentence if fault is not None else type(cause).__name__
        is_news = self.healthy
        if is_news:
            self._opened_at = self._clock()
            self._has_warned = False
            self._healthy.clear()
        self._problem = sentence
        return is_news

    def record_failed_probe(self, cause: RedisFault | None = None) -> None:
        if self.healthy:
            return
        if cause is not None:
            self._problem = cause.sentence
        away_s = self._clock() - self._opened_at
        if not self._has_warned and away_s >= LASTS_S:
            self._has_warned = True
            _log.warning("redis is away", cause=self._problem, away_s=round(away_s, 1), **self._about)

    def close(self) -> None:
        if self.healthy:
            return
        away_s = self._clock() - self._opened_at
        if self._has_warned:
            _log.info("redis is back", away_s=round(away_s, 1), **self._about)
        else:
            self._record_moment(away_s)
        self._problem = None
        self._healthy.set()

    def _record_moment(self, away_s: float) -> None:
        now = self._clock()
        self._num_moments += 1
        self._longest_moment_s = max(self._longest_moment_s, away_s)
        if self._reported_at is not None and now - self._reported_at < REPORT_INTERVAL_S:
            return
        _log.info(
            "redis could not be used for a moment; nothing was lost",
            num_moments=self._num_moments,
            longest_ms=round(1000 * self._longest_moment_s),
            last_cause=self._problem,
            **self._about,
        )
        self._reported_at, self._num_moments, self._longest_moment_s = now, 0, 0.0
