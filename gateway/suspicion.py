"""Which requests a worker may have died of, and which of them may not share workers. Pure: knows no request beyond its id.

A worker that dies takes a step with it. Every request that may have been in the step is a suspect: run again, but apart from all
other suspects, until it has got further than it was. When a worker dies again with only one suspect of before in its step, that
one is guilty: two deaths, and nobody else is blamed for the second.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.lifecycle_messages import Blame


@dataclass(frozen=True, slots=True)
class InStep:
    """A request that may have been in a dead worker's step."""

    request_id: str
    num_suspicions: int = 0
    """Deaths that it is suspected of already."""
    had_worker_alone: bool = True
    """Whether no suspect of another gateway can have been there either."""


def blame_for_death(in_step: Iterable[InStep]) -> dict[str, Blame]:
    """What a worker's death says about the requests that may have been in its step.

    Where another gateway's suspect may have been there too, one death more has to say the same.

    Returns:
        For each request what it is to be told.
    """
    requests = list(in_step)
    suspects = [request for request in requests if request.num_suspicions]
    if not suspects:
        return {request.request_id: Blame.SUSPECT for request in requests}
    is_certain = len(suspects) == 1 and (suspects[0].had_worker_alone or suspects[0].num_suspicions > 1)
    verdict = Blame.GUILTY if is_certain else Blame.SUSPECT
    return {request.request_id: verdict if request.num_suspicions else Blame.NONE for request in requests}


class Trials:
    """Suspects that run apart: at most one on each worker.

    Gateways share the workers out among themselves without a word: each worker belongs to one gateway, by a hash of their ids
    (rendezvous hashing, Thaler and Ravishankar 1998), which tries its suspects there. So suspects of two gateways do not meet.

    Args:
        gateway_id: of this gateway.
    """

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._gateway_ids = {gateway_id}
        self._request_by_worker: dict[str, str] = {}

    def set_gateways(self, gateway_ids: Iterable[str]) -> None:
        """Those that are alive; this one is among them anyway."""
        self._gateway_ids = {self._gateway_id, *gateway_ids}

    def is_own(self, worker_id: str) -> bool:
        """Whether suspects of this gateway are tried there, and of no other."""
        return max(self._gateway_ids, key=lambda gateway_id: _weight(worker_id, gateway_id)) == self._gateway_id

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


def _weight(worker_id: str, gateway_id: str) -> bytes:
    return hashlib.blake2b(f"{worker_id} {gateway_id}".encode(), digest_size=8).digest()
