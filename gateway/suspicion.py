"""Which requests a worker may have died of, and which one it has. Pure: knows no request beyond its id.

A worker that dies takes a step with it, and each request that may have been in the step is a suspect. A suspect runs again, but
alone: its decode worker computes prompt and first decode step with nothing else in between, whichever gateway the others are of
(`Work.runs_alone`). If a worker dies then, there is no doubt of what: two deaths, and nobody else is blamed for the second.

    death ─► suspects ─► one alone ─┬─► it gets two tokens further: suspect no more
                                    └─► the worker dies ─► accused ─┬─► nobody answers there: guilty
                                                                    └─► it answers: only the connection broke
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.lifecycle_messages import Blame


@dataclass(frozen=True, slots=True)
class InStep:
    """A request that may have been in a dead worker's step."""

    request_id: str
    ran_alone: bool = False
    """Whether nothing else can have been there."""


class Inquests:
    """Deaths of which it is not known yet whether they are some."""

    def __init__(self) -> None:
        self._accused: dict[str, str] = {}
        """Request id by worker id."""

    def open(self, worker_id: str, in_step: Sequence[InStep]) -> dict[str, Blame | None]:
        """A worker seems to have died.

        Returns:
            What those that may have been in its step are to be told; None: nothing before `close`.
        """
        alone = [request.request_id for request in in_step if request.ran_alone]
        if len(alone) != 1:
            return {request.request_id: Blame.SUSPECT for request in in_step}
        self._accused[worker_id] = alone[0]
        return {request.request_id: None if request.ran_alone else Blame.NONE for request in in_step}

    def close(self, worker_id: str) -> str | None:
        """It is known whether the worker has died. The request that is guilty if it has, if there is one."""
        return self._accused.pop(worker_id, None)
