"""Metrics as the code counts them: plain numbers and arrays, turned into Prometheus' form only when they are asked for.

Counting is one addition, observing one search in a short list. Knows nothing of what is counted. Each value is written by one
thread; a reader may see a histogram's sum a moment before or after its counts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of histograms of times, in seconds."""
SIZE_BOUNDS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
"""Upper bounds of histograms of tokens."""
RATE_BOUNDS = (1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 4e9, 8e9, 1.6e10, 3.2e10)
"""Upper bounds of histograms of bytes per second."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric's name and meaning. Labels take few values, each known before the process starts, but for models' names."""

    name: str
    """As it is served: with unit, and `_total` for counters."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


class Histogram:
    """How many values fell under each bound, and their sum.

    Args:
        bounds: upper bounds, ascending; a last one without end is added.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Sample(NamedTuple):
    """One series now; `labels` are the values of the family's labels, in order."""

    family: Family
    value: float | Histogram
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Sample]]
"""Gives all samples that it knows of; asked at every scrape, on the event loop."""
