"""Finds the request that crashes workers ("poison request"). Pure.

A suspected request runs alone in its decode worker (`Job.isolated`). If a worker dies then, the
cause is certain, and no other request is suspected.

    death ─► suspected ─► isolated ─┬─► two tokens further: no longer suspected
                                    └─► the worker dies ─► accused ─┬─► it is dead: confirmed
                                                                    └─► it answers: connection broke
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.lifecycle.events import CrashVerdict


@dataclass(frozen=True, slots=True)
class InStep:
    """A request that may have been in a dead worker's step."""

    request_id: str
    was_isolated: bool = False


class PoisonDetector:
    def __init__(self) -> None:
        self._accused: dict[str, str] = {}
        """Request id by worker id."""

    def on_death_suspected(self, worker_id: str, in_step: Sequence[InStep]) -> dict[str, CrashVerdict | None]:
        """Returns a verdict for each request. None: undecided until `on_death_resolved`."""
        isolated = [request.request_id for request in in_step if request.was_isolated]
        if len(isolated) != 1:
            return {request.request_id: CrashVerdict.SUSPECTED for request in in_step}
        self._accused[worker_id] = isolated[0]
        return {request.request_id: None if request.was_isolated else CrashVerdict.NONE for request in in_step}

    def on_death_resolved(self, worker_id: str) -> str | None:
        """Returns the request that was accused."""
        return self._accused.pop(worker_id, None)
