"""Watches reservations that nothing uses: no prompt was asked for, and no push has come.

    opened --run_prompt--> used
       |------isolated, ISOLATED_LIMIT_S------> failed; isolated jobs then rest for REST_S
       '------IDLE_LIMIT_S------> idle: its session gives it back when jobs of others wait for room

Lives on the event loop.
"""

import asyncio
from collections.abc import Callable

from kvrelay.core.job import FailureKind, Job, JobId

IDLE_LIMIT_S = 5.0
ISOLATED_LIMIT_S = 1.0
"""An isolated reservation stops all other sequences, so that a crash has one cause."""
REST_S = 9.0
"""Isolated reservations without a prompt stop others for a tenth of the time at most."""
LOOK_INTERVAL_S = 1.0

LAPSED_MESSAGE = "no prompt followed the isolated reservation in time; other sequences go on"
RESTING_MESSAGE = "an isolated reservation before this one was not used; try another worker"


class ReservationWatch:
    """One timer for each open reservation.

    `offer_idle` gets idle reservations, oldest first, while there are any.
    """

    def __init__(
        self,
        fail: Callable[[JobId, FailureKind, str], None],
        offer_idle: Callable[[tuple[JobId, ...]], None],
    ) -> None:
        self._fail = fail
        self._offer_idle = offer_idle
        self._isolated: set[JobId] = set()
        self._timers: dict[JobId, asyncio.TimerHandle] = {}
        self._idle: dict[JobId, None] = {}
        self._look: asyncio.TimerHandle | None = None
        self._rests_until = 0.0

    @property
    def num_watched(self) -> int:
        return len(self._timers) + len(self._idle)

    def refusal_of(self, job: Job) -> str | None:
        """Why no blocks are asked for, or None."""
        if not job.isolated:
            return None
        if asyncio.get_running_loop().time() < self._rests_until:
            return RESTING_MESSAGE
        self._isolated.add(job.job_id)
        return None

    def on_opened(self, job_id: JobId) -> None:
        limit_s, call = (ISOLATED_LIMIT_S, self._lapse) if job_id in self._isolated else (IDLE_LIMIT_S, self._set_idle)
        self._timers[job_id] = asyncio.get_running_loop().call_later(limit_s, call, job_id)

    def on_used(self, job_id: JobId) -> None:
        """Its prompt is computed here, or the job has ended."""
        self._isolated.discard(job_id)
        self._idle.pop(job_id, None)
        if timer := self._timers.pop(job_id, None):
            timer.cancel()
        if not self._idle and self._look is not None:
            self._look.cancel()
            self._look = None

    def _lapse(self, job_id: JobId) -> None:
        self.on_used(job_id)
        self._rests_until = asyncio.get_running_loop().time() + REST_S
        self._fail(job_id, FailureKind.OUT_OF_CAPACITY, LAPSED_MESSAGE)

    def _set_idle(self, job_id: JobId) -> None:
        self._timers.pop(job_id, None)
        self._idle[job_id] = None
        if self._look is None:
            self._offer()

    def _offer(self) -> None:
        self._look = asyncio.get_running_loop().call_later(LOOK_INTERVAL_S, self._offer)
        self._offer_idle(tuple(self._idle))
