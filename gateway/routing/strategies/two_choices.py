"""The less busy of two workers drawn at random. Pure.

So gateways that see the same loads choose different ones (Mitzenmacher 2001).
"""

from collections.abc import Callable, Sequence

from gateway.routing.candidates import candidates_for
from gateway.routing.router import Assignment, RouteQuery, WorkerView, decode_cost, prefill_cost

Draw = Callable[[], float]
"""Returns a number in [0, 1)."""


class TwoChoicesStrategy:
    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        return candidates_for(workers, query).assign(
            lambda decode: min(two_of(decode, self._draw), key=lambda worker: decode_cost(worker, query)),
            lambda prefill: min(two_of(prefill, self._draw), key=prefill_cost(prefill, query)),
        )


def two_of(workers: Sequence[WorkerView], draw: Draw) -> Sequence[WorkerView]:
    """Returns all when there are fewer."""
    if len(workers) <= 2:
        return workers
    first, second = int(draw() * len(workers)), int(draw() * (len(workers) - 1))
    return workers[first], workers[second + (second >= first)]
