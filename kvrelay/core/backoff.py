"""Exponential back-off with jitter. Pure."""

from collections.abc import Callable


class Backoff:
    """The n-th delay is drawn from [d/2, d] with d = min(maximum_s, initial_s * 2**n)."""

    def __init__(self, initial_s: float, maximum_s: float, draw: Callable[[], float]) -> None:
        assert 0 < initial_s <= maximum_s, "delays are positive and the first is not the longest"
        self._initial_s = initial_s
        self._maximum_s = maximum_s
        self._draw = draw
        self._num_failures = 0

    def next_delay_s(self) -> float:
        # Without a bound of the exponent, a day of failures overflows the float.
        longest_s = min(self._maximum_s, self._initial_s * 2.0 ** min(self._num_failures, 32))
        self._num_failures += 1
        return longest_s * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        self._num_failures = 0
