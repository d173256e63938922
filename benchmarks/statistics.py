"""Medians, spreads and percentiles of a few measured numbers. Knows nothing of what they measure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing, in its unit."""

    num_values: int
    median: float
    min: float
    max: float

    def text(self, decimals: int = 1, factor: float = 1.0) -> str:
        """`median (min to max)`, each times `factor`; the median alone where there was one
        measurement.
        """
        median, low, high = (f"{factor * value:,.{decimals}f}" for value in (self.median, self.min, self.max))
        return median if self.num_values == 1 else f"{median} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Spread of one value or more."""
    return Spread(len(values), statistics.median(values), min(values), max(values))


def percentile(values: Sequence[float], percent: int) -> float:
    """Percentile from 1 to 99, interpolated, of one value or more."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
