"""Which requests a worker may have died of, and which of them may not share workers. Pure: knows no request beyond its id.

A worker that dies takes a step with it. Every request that may have been in the step is a suspect: run again, but apart from all
other suspects, until it has got further than it was. When a worker dies again with only one suspect of before in its step, that
one is guilty: two deaths, and nobody else is blamed for the second.
"""

from collections.abc import Iterable

from gateway.lifecycle_messages import Blame


def blame_for_death(in_step: Iterable[tuple[str, bool]]) -> dict[str, Blame]:
    """What a worker's death says about the requests that may have been in its step.

    Args:
        in_step: (request id, whether it is a suspect of an earlier death).

    Returns:
        For each request what it is to be told.
    """
    requests = dict(in_step)
    suspects = [request_id for request_id, is_suspect in requests.items() if is_suspect]
    if not suspects:
        return dict.fromkeys(requests, Blame.SUSPECT)
    verdict = Blame.GUILTY if len(suspects) == 1 else Blame.SUSPECT
    return dict.fromkeys(requests, Blame.NONE) | dict.fromkeys(suspects, verdict)


class Trials:
    """Suspects that run apart: at most one on each worker."""

    def __init__(self) -> None:
        self._request_by_worker: dict[str, str] = {}

    def workers_of_others(self, request_id: str) -> frozenset[str]:
        """Workers on which another suspect is."""
        return frozenset(worker_id for worker_id, other in self._request_by_worker.items() if other != request_id)

    def begin(self, request_id: str, worker_ids: Iterable[str | None]) -> None:
        """The suspect has these workers for itself, as far as other suspects go. None is ignored."""
        self._request_by_worker |= {worker_id: request_id for worker_id in worker_ids if worker_id is not None}

    def end(self, request_id: str) -> bool:
        """It got further, or was given up. Whether it had any worker."""
        workers = [worker_id for worker_id, other in self._request_by_worker.items() if other == request_id]
        for worker_id in workers:
            del self._request_by_worker[worker_id]
        return bool(workers)
