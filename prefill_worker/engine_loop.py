"""The prefill worker's engine loop: schedule, run, announce each written layer, publish."""

import time
from collections.abc import Callable
from dataclasses import replace

from kvrelay.core.job import WorkerLoad
from kvrelay.runtime.fault_points import fault_point
from kvrelay.worker.commands import CancelJob, FailJob, JobEnded, JobFailed, MasksMade
from kvrelay.worker.mask_desk import MaskDesk
from kvrelay.worker.step import Step
from kvrelay.worker.step_executor import StepExecutor
from kvrelay.worker.step_observer import StepObserver
from kvrelay.worker.step_runner import StepRunner
from prefill_worker import commands
from prefill_worker.scheduling import events
from prefill_worker.scheduling.scheduler import PrefillScheduler


class PrefillEngineLoop:
    """Used by the engine thread.

    Args:
        publish: takes reports in order; must not block.
        announce: takes a layer and its tokens in the pool; must not block.
        masks: makes slow masks in other threads; None makes all in the engine thread.
    """

    def __init__(
        self,
        scheduler: PrefillScheduler,
        step_runner: StepRunner,
        publish: Callable[[events.Report], None],
        announce: Callable[[int, tuple[events.WrittenTokens, ...]], None],
        now: Callable[[], float] = time.monotonic,
        masks: MaskDesk | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._publish = publish
        self._announce = announce
        self._observer = StepObserver(
            scheduler.pace,
            begins=lambda step: fault_point("prefill.step_begins", step),
            computed=lambda step, tokens: fault_point("prefill.step_computed", step),
            now=now,
        )
        self._executor = StepExecutor(scheduler, step_runner, self._observer, masks)
        self._published_load: WorkerLoad | None = None

    def step(self) -> bool:
        self._executor.collect_masks()
        step = self._scheduler.schedule()
        self._publish_report()
        if step is None:
            return False
        announced: list[set[int]] = []
        self._executor.run(step, lambda part: self._announcer(part, announced))
        self._publish_report()
        return True

    def handle(self, command: commands.Command) -> None:
        match command:
            case commands.StartPrompt(prepared, received_at):
                self._observer.on_prompt_asked(prepared.job.job_id, received_at)
                self._scheduler.start(prepared)
            case commands.SenderEnded(job_id, problem):
                self._scheduler.sender_ended(job_id, problem)
            case MasksMade():
                pass  # collected before the next step
            case CancelJob(job_id):
                self._scheduler.cancel(job_id)
            case FailJob(job_id, kind, message):
                self._scheduler.fail(job_id, kind, message)

    def fail_all(self) -> None:
        self._executor.fail_all()
        self._publish_report()

    def _announcer(self, step: Step, announced: list[set[int]]) -> Callable[[int], None]:
        """A failed step runs again by entry. `announced` keeps senders from hearing of a layer
        twice.
        """
        written = tuple(
            events.WrittenTokens(entry.job_id, entry.token_begin, entry.token_end) for entry in step.entries
        )
        known = announced[0] if announced else frozenset()
        own: set[int] = set()
        announced.append(own)

        def announce(layer: int) -> None:
            if layer not in known:
                own.add(layer)
                self._announce(layer, written)
                fault_point("prefill.layer_written", layer, written)

        return announce

    def _publish_report(self) -> None:
        completed = tuple(self._complete_event(event) for event in self._scheduler.drain_events())
        load, changes = self._scheduler.load(), self._scheduler.take_cache_changes()
        if completed or changes or load != self._published_load:
            self._published_load = load
            self._publish(events.Report(completed, load, changes))

    def _complete_event(self, event: events.Event) -> events.Event:
        match event:
            case events.PromptStarted(job):
                self._observer.on_prompt_begins(job.job_id)
            case events.PromptComputed(job_id):
                prompt = self._observer.finish_prompt(job_id)
                assert prompt is not None, "a prompt is computed after it has started"
                return replace(event, queue_ms=prompt.queue_ms, prefill_ms=prompt.prefill_ms, chunks=prompt.chunks)
            case JobFailed(job_id) | JobEnded(job_id):
                self._observer.discard_prompt(job_id)
        return event
