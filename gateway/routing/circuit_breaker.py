"""Circuit breakers of workers, and of prefill-decode pairs. Pure; times are monotonic seconds.

new session   INITIAL_LIMIT requests, one more a success, unlimited from UNLIMITED_FROM
worker fails  FAILURES_TO_OPEN in a row: nothing during the cooldown, then one probe
pair fails    nothing during the cooldown, then one probe
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvrelay.core.backoff import Backoff

INITIAL_LIMIT = 8
UNLIMITED_FROM = 16
FAILURES_TO_OPEN = 3
FIRST_COOLDOWN_S = 0.5
LONGEST_COOLDOWN_S = 30.0
PAIR_COOLDOWN_S = 10.0
LONGEST_PAIR_FACTOR = 8.0
PROBE_TIMEOUT_S = 2.0
"""Then other jobs use the probed pair again."""


class WorkerCircuitBreaker:
    """Breaker of one session. Its slow start protects a worker that comes back."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.concurrency_limit: int | None = INITIAL_LIMIT
        """Requests that may wait for the worker; None: any number."""
        self._unproven: set[str] = set()
        self._num_failures = 0
        self._open_until = 0.0
        self._cooldowns = Backoff(FIRST_COOLDOWN_S, LONGEST_COOLDOWN_S, draw)

    def allows(self, now: float) -> bool:
        return now >= self._open_until and (
            self.concurrency_limit is None or len(self._unproven) < self.concurrency_limit
        )

    def start(self, request_id: str) -> None:
        self._unproven.add(request_id)

    def release(self, request_id: str) -> None:
        """The request left, which proves nothing about the worker."""
        self._unproven.discard(request_id)

    def on_success(self, request_id: str) -> int:
        """Returns how many more requests it may get."""
        self._unproven.discard(request_id)
        self._num_failures = 0
        if self.concurrency_limit is None:
            return 0
        self._cooldowns.reset()
        self.concurrency_limit += 1
        if self.concurrency_limit >= UNLIMITED_FROM:
            self.concurrency_limit = None
            return UNLIMITED_FROM
        return 2

    def on_failure(self, request_id: str, now: float) -> None:
        self._unproven.discard(request_id)
        self._num_failures += 1
        is_probe = self.concurrency_limit is not None and self.concurrency_limit < INITIAL_LIMIT
        if is_probe or self._num_failures >= FAILURES_TO_OPEN:
            self._open_until = now + self._cooldowns.next_delay_s()
            self.concurrency_limit = 1


class PairCircuitBreaker:
    """(decode, prefill) workers whose last transfer failed.

    Repeated failure doubles the cooldown. When it ends, one job probes the pair.
    """

    def __init__(self, draw: Callable[[], float], cooldown_s: float = PAIR_COOLDOWN_S) -> None:
        self._draw = draw
        self._cooldown_s = cooldown_s
        self._cooldowns: dict[tuple[str, str], _Cooldown] = {}

    def on_failure(self, pair: tuple[str, str], now: float) -> None:
        """Jobs that fail together count once."""
        cooldown = self._cooldowns.get(pair)
        if cooldown is not None and now < cooldown.until and not cooldown.is_probed:
            return
        factor = 1.0 if cooldown is None else min(2.0 * cooldown.factor, LONGEST_PAIR_FACTOR)
        self._cooldowns[pair] = _Cooldown(factor, now + self._cooldown_s * factor * (1.0 + 0.5 * self._draw()))

    def on_use(self, pair: tuple[str, str], now: float) -> None:
        cooldown = self._cooldowns.get(pair)
        if cooldown is not None and not cooldown.is_probed:
            self._cooldowns[pair] = _Cooldown(cooldown.factor, now + PROBE_TIMEOUT_S, is_probed=True)

    def open_pairs(self, now: float) -> frozenset[tuple[str, str]]:
        """Returns the pairs to avoid now."""
        # A pair is remembered for another cooldown, so that the next failure doubles it.
        self._cooldowns = {
            pair: cooldown
            for pair, cooldown in self._cooldowns.items()
            if now < cooldown.until + self._cooldown_s * cooldown.factor
        }
        return frozenset(pair for pair, cooldown in self._cooldowns.items() if now < cooldown.until)


@dataclass(frozen=True, slots=True)
class _Cooldown:
    factor: float
    until: float
    is_probed: bool = False
