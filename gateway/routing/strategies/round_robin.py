"""Workers take turns, in the order of their ids. Pure."""

from collections.abc import Callable, Sequence

from gateway.routing.candidates import candidates_for
from gateway.routing.router import Assignment, RouteQuery, WorkerView


class RoundRobinStrategy:
    def __init__(self) -> None:
        self._last_decode_worker_id = ""
        self._last_prefill_worker_id = ""

    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        assignment = candidates_for(workers, query).assign(
            _next_after(self._last_decode_worker_id), _next_after(self._last_prefill_worker_id)
        )
        if assignment is not None:
            self._last_decode_worker_id = assignment.decode_worker_id
            self._last_prefill_worker_id = assignment.prefill_worker_id or self._last_prefill_worker_id
        return assignment


def _next_after(worker_id: str) -> Callable[[Sequence[WorkerView]], WorkerView]:
    return lambda workers: min(workers, key=lambda worker: (worker.worker_id <= worker_id, worker.worker_id))
