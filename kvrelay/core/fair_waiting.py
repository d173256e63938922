"""Who may wait in a full queue. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar

from kvrelay.core.job import Job

GIVES_WAY_MESSAGE = "the queue is full, and other gateways have fewer jobs in it; try again later"


class Waiting(Protocol):
    @property
    def spec(self) -> Job:
        raise NotImplementedError


WaitingT = TypeVar("WaitingT", bound=Waiting)


def who_gives_way(waiting: Sequence[WaitingT], newcomer: Job) -> WaitingT | None:
    """Returns the youngest job of the session with most of them, for a newcomer of one with fewer.

    None: it has its part. `waiting`: the oldest first.
    """
    num_waiting = Counter(job.spec.holder for job in waiting)
    if not num_waiting:
        return None
    greediest, most = num_waiting.most_common(1)[0]
    if most <= num_waiting[newcomer.holder] + 1:
        return None
    return next(job for job in reversed(waiting) if job.spec.holder == greediest)
