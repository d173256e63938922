"""Metrics as plain numbers and arrays, cheap to count.

One thread writes each value. A reader may see a histogram's sum before or after its counts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

LATENCY_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZE_BOUNDS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
"""In tokens."""
RATE_BOUNDS = (1e7, 3e7, 1e8, 3e8, 1e9, 2e9, 4e9, 8e9, 1.6e10, 3.2e10)
"""In bytes per second."""


@dataclass(frozen=True, slots=True)
class Family:
    """Only names of models are label values that appear after the start."""

    name: str
    """With unit, and `_total` for counters."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


class Histogram:
    """Counts of values by upper bound, ascending and then infinite, and their sum."""

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
        return sum(self.counts)


class Sample(NamedTuple):
    """Labels are values, in the order of the family's."""

    family: Family
    value: float | Histogram
    labels: tuple[str, ...] = ()


Source = Callable[[], Iterable[Sample]]
"""Called at every scrape, on the event loop."""
