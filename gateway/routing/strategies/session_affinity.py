"""Requests with the same key go to the same workers. Pure.

By rendezvous hashing (Thaler and Ravishankar 1998): a worker that comes or goes moves only its own
keys.
"""

import hashlib
from collections.abc import Sequence

from gateway.routing.candidates import candidates_for
from gateway.routing.router import Assignment, RouteQuery, WorkerView, choose_workers


class SessionStrategy:
    def choose(self, workers: Sequence[WorkerView], query: RouteQuery) -> Assignment | None:
        """By load without a key."""
        if not query.session_key:
            return choose_workers(workers, query)
        # Each tenant has keys of its own.
        key = hashlib.blake2b(f"{query.cache_salt}/{query.session_key}".encode(), digest_size=16).digest()

        def pick(candidates: Sequence[WorkerView]) -> WorkerView:
            return max(candidates, key=lambda worker: _score(key, worker))

        return candidates_for(workers, query).assign(pick, pick)


def _score(key: bytes, worker: WorkerView) -> bytes:
    return hashlib.blake2b(worker.worker_id.encode(), digest_size=16, key=key).digest()
