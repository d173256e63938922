"""The least busy workers. Pure."""

from collections.abc import Sequence

from gateway.routing.router import Assignment, RouteQuery, WorkerView, choose_workers


class LoadStrategy:
    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        return choose_workers(workers, query)
