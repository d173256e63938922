"""The requests that this gateway runs, and the last of those that ended. Brings events to them; knows no worker and no store."""

import asyncio
from collections import OrderedDict

from gateway import lifecycle_messages as m
from gateway.request_runner import RequestRunner
from gateway.suspicion import Inquests, InStep

MAX_ENDED_REQUESTS = 512
MAX_ENDED_FRAMES = 100_000


class RunningRequests:
    """Requests by id. Ended ones are kept, bounded, so that they can be read again without the store."""

    def __init__(self) -> None:
        self._running: dict[str, RequestRunner] = {}
        self._ended: OrderedDict[str, RequestRunner] = OrderedDict()
        self._num_ended_frames = 0
        self._inquests = Inquests()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Waits until nothing runs; False when that took too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def add(self, runner: RequestRunner) -> None:
        """A request is about to start."""
        self._running[runner.request_id] = runner
        self._idle.clear()

    def note_ended(self, runner: RequestRunner) -> None:
        """A request has ended."""
        self._running.pop(runner.request_id, None)
        self._ended[runner.request_id] = runner
        self._num_ended_frames += len(runner.output.frames)
        while len(self._ended) > MAX_ENDED_REQUESTS or self._num_ended_frames > MAX_ENDED_FRAMES:
            _, forgotten = self._ended.popitem(last=False)
            self._num_ended_frames -= len(forgotten.output.frames)
        if not self._running:
            self._idle.set()

    def find(self, request_id: str) -> RequestRunner | None:
        """A request that runs here, or ended here a while ago and not because it goes on elsewhere."""
        runner = self._running.get(request_id) or self._ended.get(request_id)
        return None if runner is None or runner.journal.released else runner

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self) -> list[RequestRunner]:
        """In the order of their start."""
        return list(self._running.values())

    def known(self) -> list[RequestRunner]:
        """Running and ended ones, newest first."""
        known = [*self._running.values(), *self._ended.values()]
        return sorted(known, key=lambda runner: runner.journal.record.create_time_ms, reverse=True)

    def dispatch(self, request_id: str, event: m.Event) -> None:
        """Brings an event to its request; what concerns none is dropped."""
        runner = self._running.get(request_id)
        if runner is not None:
            runner.post(event)

    def note_worker_lost(self, worker_id: str, died: bool = False) -> None:
        """The session with a worker ended. `died`: all at once, as when its process crashes, and not by silence or orderly."""
        runners = self.running()
        blame: dict[str, m.Blame | None] = {}
        if died:
            in_step = [runner for runner in runners if runner.lifecycle.may_be_in_step_of(worker_id)]
            blame = self._inquests.open(
                worker_id, [InStep(runner.request_id, runner.lifecycle.runs_alone_on(worker_id)) for runner in in_step]
            )
        for runner in runners:
            verdict = blame.get(runner.request_id, m.Blame.NONE)
            if verdict is not None:
                runner.post(m.WorkerLost(worker_id, verdict))

    def note_worker_fate(self, worker_id: str, died: bool) -> None:
        """It is known now whether a worker has died of which `note_worker_lost` said that it seems to have."""
        accused = self._running.get(self._inquests.close(worker_id) or "")
        cleared = frozenset() if died else frozenset((worker_id,))
        if accused is not None:
            if died:  # and so did those before: nobody else needs to be tried for them
                cleared = accused.lifecycle.suspected_worker_ids
            accused.post(m.WorkerLost(worker_id, m.Blame.GUILTY if died else m.Blame.NONE))
        for runner in self.running():
            for cleared_id in runner.lifecycle.suspected_worker_ids & cleared:
                runner.post(m.Cleared(cleared_id))

    def note_room(self, num_requests: int) -> None:
        """So many requests more may be given to workers: the oldest that wait are."""
        for runner in self.running():
            if num_requests <= 0:
                return
            num_requests -= runner.workers_changed()

    def note_workers_changed(self) -> None:
        """A worker was found."""
        for runner in self.running():
            runner.workers_changed()

    def supersede(self, request_id: str) -> None:
        """The request goes on at another gateway."""
        runner = self._running.get(request_id)
        if runner is not None:
            runner.release()
