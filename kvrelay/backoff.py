"""How long to wait before the next try: exponential, bounded, with jitter so that many do not try at once. Owns no clock."""

import random
from collections.abc import Callable


class Backoff:
    """Delays of one thing that is tried again and again.

    The n-th delay is drawn from [d/2, d] with d = min(maximum_s, initial_s * 2**n): half of it is certain, so that a thing that
    fails at once is not tried in a tight loop.
    """

    def __init__(self, initial_s: float, maximum_s: float, draw: Callable[[], float] = random.random) -> None:
        assert 0 < initial_s <= maximum_s, "delays are positive and the first is not the longest"
        self._initial_s = initial_s
        self._maximum_s = maximum_s
        self._draw = draw
        self._num_failures = 0

    def next_delay_s(self) -> float:
        """The delay before the next try, in seconds."""
        # The exponent is bounded, or a day of failures would overflow the float.
        longest_s = min(self._maximum_s, self._initial_s * 2.0 ** min(self._num_failures, 32))
        self._num_failures += 1
        return longest_s * (0.5 + 0.5 * self._draw())

    def reset(self) -> None:
        """It worked: the next failure starts from the first delay."""
        self._num_failures = 0
