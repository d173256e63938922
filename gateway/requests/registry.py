"""The requests that this gateway runs, and the last that ended."""

import asyncio
from collections import OrderedDict

from gateway.lifecycle import events
from gateway.lifecycle.poison_detector import InStep, PoisonDetector
from gateway.requests.runner import RequestRunner
from gateway.streaming.frames import MAX_ENDED_FRAMES

MAX_ENDED_REQUESTS = 512


class RunningRequests:
    """Ended requests can be read for a while without the store."""

    def __init__(self) -> None:
        self._running: dict[str, RequestRunner] = {}
        self._ended: OrderedDict[str, RequestRunner] = OrderedDict()
        self._num_ended_frames = 0
        self._poison_detector = PoisonDetector()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Returns False on timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def add(self, runner: RequestRunner) -> None:
        self._running[runner.request_id] = runner
        self._idle.clear()

    def on_ended(self, runner: RequestRunner) -> None:
        self._running.pop(runner.request_id, None)
        self._ended[runner.request_id] = runner
        self._num_ended_frames += len(runner.output.frames)
        while len(self._ended) > MAX_ENDED_REQUESTS or self._num_ended_frames > MAX_ENDED_FRAMES:
            _, forgotten = self._ended.popitem(last=False)
            self._num_ended_frames -= len(forgotten.output.frames)
        if not self._running:
            self._idle.set()

    def find(self, request_id: str) -> RequestRunner | None:
        """Returns None for a request that was left to another gateway."""
        runner = self._running.get(request_id) or self._ended.get(request_id)
        return None if runner is None or runner.journal.released else runner

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self) -> list[RequestRunner]:
        """Oldest first."""
        return list(self._running.values())

    def known(self) -> list[RequestRunner]:
        """Newest first."""
        known = [*self._running.values(), *self._ended.values()]
        return sorted(known, key=lambda runner: runner.journal.record.create_time_ms, reverse=True)

    def dispatch(self, request_id: str, event: events.Event) -> None:
        """Drops events of unknown requests."""
        runner = self._running.get(request_id)
        if runner is not None:
            runner.post(event)

    def on_worker_lost(self, worker_id: str, died: bool = False) -> None:
        """`died`: the session broke, as in a crash."""
        runners = self.running()
        verdicts: dict[str, events.CrashVerdict | None] = {}
        if died:
            in_step = [runner for runner in runners if runner.lifecycle.may_be_in_step_of(worker_id)]
            verdicts = self._poison_detector.on_death_suspected(
                worker_id, [InStep(runner.request_id, runner.lifecycle.is_isolated_on(worker_id)) for runner in in_step]
            )
        for runner in runners:
            verdict = verdicts.get(runner.request_id, events.CrashVerdict.NONE)
            if verdict is not None:
                runner.post(events.WorkerLost(worker_id, verdict))

    def on_death_confirmed(self, worker_id: str, died: bool) -> None:
        accused = self._running.get(self._poison_detector.on_death_resolved(worker_id) or "")
        cleared = frozenset() if died else frozenset((worker_id,))
        if accused is not None:
            if died:  # its earlier victims are explained too
                cleared = accused.lifecycle.suspected_worker_ids
            accused.post(
                events.WorkerLost(worker_id, events.CrashVerdict.CONFIRMED if died else events.CrashVerdict.NONE)
            )
        for runner in self.running():
            for cleared_id in runner.lifecycle.suspected_worker_ids & cleared:
                runner.post(events.SuspicionCleared(cleared_id))

    def on_room(self, num_requests: int) -> None:
        """Routes the oldest waiting requests."""
        for runner in self.running():
            if num_requests <= 0:
                return
            num_requests -= runner.workers_changed()

    def on_workers_changed(self) -> None:
        for runner in self.running():
            runner.workers_changed()

    def supersede(self, request_id: str) -> None:
        runner = self._running.get(request_id)
        if runner is not None:
            runner.release()
