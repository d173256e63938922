"""The decode worker's engine loop. Adds model, clock and tickets to the pure scheduler."""

import time
from collections.abc import Callable
from dataclasses import replace

from decode_worker import commands
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling import events
from decode_worker.scheduling.scheduler import DecodeScheduler
from kvrelay.core.job import JobId, SequenceToken, WorkerLoad
from kvrelay.runtime.fault_points import fault_point
from kvrelay.worker.commands import CancelJob, FailJob, JobEnded, JobFailed, MasksMade
from kvrelay.worker.mask_desk import MaskDesk
from kvrelay.worker.step_executor import StepExecutor
from kvrelay.worker.step_observer import StepObserver
from kvrelay.worker.step_runner import StepRunner


class DecodeEngineLoop:
    """Used by the engine thread.

    Args:
        publish: takes reports in order; must not block.
        masks: makes slow masks in other threads; None makes all here.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        step_runner: StepRunner,
        grants: WriteGrants,
        publish: Callable[[events.StepReport], None],
        now: Callable[[], float] = time.monotonic,
        masks: MaskDesk | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._grants = grants
        self._publish = publish
        self._observer = StepObserver(
            scheduler.pace,
            begins=lambda step: fault_point("decode.step_begins", step),
            computed=lambda step, tokens: fault_point("decode.step_computed", tokens),
            now=now,
        )
        self._executor = StepExecutor(scheduler, step_runner, self._observer, masks)
        self._pushes: dict[JobId, commands.PushEnded] = {}
        self._published_load: WorkerLoad | None = None

    def step(self) -> bool:
        self._executor.collect_masks()
        step = self._scheduler.schedule()
        if step is None:
            self._publish_report()
            return False
        if self._scheduler.has_events:  # a changed load alone waits for the step's end
            self._publish_report()
        tokens = self._executor.run(step)
        self._publish_report(tokens)
        return True

    def handle(self, command: commands.Command) -> None:
        match command:
            case commands.ReserveBlocks(prepared):
                self._scheduler.reserve(prepared)
                # Grant now: the next command may end the reservation, and free its blocks.
                self._publish_report()
                fault_point("decode.blocks_reserved", prepared.job)
            case commands.ComputePrompt(job_id):
                if self._scheduler.run_prompt(job_id):
                    self._observer.on_prompt_asked(job_id)
            case commands.PushEnded(job_id, first_tokens, problem=problem):
                self._pushes[job_id] = command
                self._scheduler.push_ended(job_id, first_tokens, problem)
                self._publish_report()
                self._pushes.pop(job_id, None)
            case commands.EndSequence(job_id, sequence):
                self._scheduler.finish_sequence(job_id, sequence)
            case commands.SetPaused(job_id, paused):
                self._scheduler.set_paused(job_id, paused)
            case commands.YieldReservations(idle):
                self._scheduler.yield_reservations(idle)
            case MasksMade():
                pass  # collected before the next step
            case CancelJob(job_id):
                self._scheduler.cancel(job_id)
            case FailJob(job_id, kind, message):
                self._scheduler.fail(job_id, kind, message)

    def fail_all(self) -> None:
        self._executor.fail_all()
        self._publish_report()

    def _publish_report(self, tokens: tuple[SequenceToken, ...] = ()) -> None:
        completed = tuple(self._complete_event(event) for event in self._scheduler.drain_events())
        load, changes = self._scheduler.load(), self._scheduler.take_cache_changes()
        if completed or changes or tokens or load != self._published_load:
            self._published_load = load
            self._publish(events.StepReport(completed, tokens, load, changes))

    def _complete_event(self, event: events.SchedulerEvent) -> events.Event:
        match event:
            case events.BlocksReserved(job, block_ids, num_cached_tokens):
                ticket = self._grants.grant(job, block_ids, num_cached_tokens)
                return events.ReservationOpened(job.job_id, ticket, num_cached_tokens)
            case events.SequencesStarted(job_id):
                return self._measure_start(event, job_id)
            case JobFailed(job_id) | JobEnded(job_id):
                self._observer.discard_prompt(job_id)
        return event

    def _measure_start(self, event: events.SequencesStarted, job_id: JobId) -> events.SequencesStarted:
        if push := self._pushes.get(job_id):
            return replace(event, kv_bytes=push.kv_bytes, num_transferred_tokens=push.num_transferred_tokens)
        prompt = self._observer.finish_prompt(job_id)
        if prompt is None:
            return event
        return replace(
            event, prefill_ms=prompt.queue_ms + prompt.prefill_ms, queue_ms=prompt.queue_ms, chunks=prompt.chunks
        )
