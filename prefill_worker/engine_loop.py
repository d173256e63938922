"""The prefill worker's engine loop: admit, schedule, run, sample, publish. Runs in the engine thread, which owns it all.

Tells the senders layer by layer what is written, so that KV travels while the rest of the step is computed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from kvrelay.chunk_times import ChunkLog, ChunkTime
from kvrelay.fault_points import fault_point
from kvrelay.step import Step
from kvrelay.step_failure import INTERNAL_MESSAGE, failure_of
from kvrelay.step_runner import StepRunner
from kvrelay.work import FailureKind, WorkerLoad, WorkId
from prefill_worker import commands, events
from prefill_worker.scheduler import PrefillScheduler

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _PromptTimes:
    """Monotonic seconds."""

    received_at: float
    began_at: float = 0.0
    chunks: ChunkLog = field(default_factory=ChunkLog)


class PrefillEngineLoop:
    """What the engine thread of a prefill worker does.

    Args:
        scheduler: with its block manager.
        step_runner: the model.
        publish: takes reports, in order; called in the engine thread, must not block.
        announce: told that a layer of these tokens is in the pool; called in the engine thread, must not block.
        now: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: PrefillScheduler,
        step_runner: StepRunner,
        publish: Callable[[events.Report], None],
        announce: Callable[[int, tuple[events.WrittenTokens, ...]], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._step_runner = step_runner
        self._publish = publish
        self._announce = announce
        self._now = now
        self._times: dict[WorkId, _PromptTimes] = {}
        self._published_load: WorkerLoad | None = None

    def handle(self, command: commands.Command) -> None:
        """Takes one command."""
        match command:
            case commands.StartPrompt(work, received_at):
                self._times[work.work_id] = _PromptTimes(received_at)
                self._scheduler.start(work)
            case commands.SenderEnded(work_id, problem):
                self._scheduler.sender_ended(work_id, problem)
            case commands.GiveUp(work_id):
                self._scheduler.cancel(work_id)
            case commands.Fail(work_id, kind, message):
                self._scheduler.fail(work_id, kind, message)

    def step(self) -> bool:
        """Schedules, runs, samples, publishes. False when there was nothing to compute."""
        step = self._scheduler.schedule()
        self._publish_report()
        if step is None:
            return False
        fault_point("prefill.step_begins", step)
        began_at = self._now()
        computed = [events.WrittenTokens(entry.work_id, entry.token_begin, entry.token_end) for entry in step.entries]
        self._run(step)
        self._note_chunks(computed, began_at)
        fault_point("prefill.step_computed", step)
        self._publish_report()
        return True

    def fail_all(self) -> None:
        """Ends all works."""
        for work_id in self._scheduler.work_ids():
            self._scheduler.fail(work_id, FailureKind.INTERNAL, INTERNAL_MESSAGE)
        self._publish_report()

    def _run(self, step: Step) -> None:
        announced: set[int] = set()
        try:
            tokens = self._step_runner.run(step, self._announcer(step, announced))
        except Exception as error:
            _log.exception("a step failed", num_prompts=len(step.entries))
            self._run_apart(step, announced, error)
            return
        self._scheduler.complete(step, tokens)

    def _run_apart(self, step: Step, announced: set[int], error: Exception) -> None:
        """A step failed: only those of its prompts fail that cannot be computed by themselves either.

        Args:
            step: that failed.
            announced: layers that the senders know already; what is computed again is the same.
            error: why it failed.
        """
        parts = step.apart()
        if len(parts) == 1:
            self._scheduler.fail_step(step, *failure_of(error))
            return
        for part in parts:
            try:
                tokens = self._step_runner.run(part, self._announcer(part, set(announced)))
            except Exception as error_of_part:
                _log.exception("a prompt fails its step", **part.entries[0].sequence.work.log_fields)
                self._scheduler.fail_step(part, *failure_of(error_of_part))
                continue
            self._scheduler.complete(part, tokens)

    def _announcer(self, step: Step, announced: set[int]) -> Callable[[int], None]:
        """Tells the senders of each layer that is not among those announced, and adds it to them."""
        written = tuple(events.WrittenTokens(entry.work_id, entry.token_begin, entry.token_end) for entry in step.entries)

        def announce(layer: int) -> None:
            if layer not in announced:
                announced.add(layer)
                self._announce(layer, written)
                fault_point("prefill.layer_written", layer, written)

        return announce

    def _note_chunks(self, computed: list[events.WrittenTokens], began_at: float) -> None:
        """A step with these chunks is over."""
        ended_at = self._now()
        for chunk in computed:
            times = self._times.get(chunk.work_id)
            if times is not None:
                begin_ms, end_ms = (began_at - times.began_at) * 1000, (ended_at - times.began_at) * 1000
                times.chunks.add(ChunkTime(begin_ms, end_ms, chunk.token_begin, chunk.token_end))

    def _publish_report(self) -> None:
        happened = tuple(self._complete_event(event) for event in self._scheduler.take_events())
        load = self._scheduler.load()
        if happened or load != self._published_load:
            self._published_load = load
            self._publish(events.Report(happened, load))

    def _complete_event(self, event: events.Event) -> events.Event:
        """Adds the times, which the scheduler does not know."""
        match event:
            case events.PromptStarted(work):
                self._times[work.work_id].began_at = self._now()
            case events.PromptComputed(work_id):
                times = self._times[work_id]
                return replace(
                    event,
                    queue_ms=(times.began_at - times.received_at) * 1000,
                    prefill_ms=(self._now() - times.began_at) * 1000,
                    chunks=times.chunks.times,
                )
            case events.WorkFailed(work_id) | events.WorkEnded(work_id):
                self._times.pop(work_id, None)
        return event
