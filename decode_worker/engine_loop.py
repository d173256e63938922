"""The decode worker's engine loop: admit, schedule, run, sample, publish. Runs in the engine thread, which owns it all.

Adds to the scheduler what that must not have: the model, the clock, and the tickets of reservations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from decode_worker import commands, events
from decode_worker.push_permits import PushPermits
from decode_worker.scheduler import DecodeScheduler
from kvrelay.chunk_times import ChunkLog, ChunkTime
from kvrelay.fault_points import fault_point
from kvrelay.step import Step
from kvrelay.step_failure import INTERNAL_MESSAGE, failure_of
from kvrelay.step_runner import StepRunner
from kvrelay.work import FailureKind, SequenceToken, WorkerLoad, WorkId

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _PromptTimes:
    """When a prompt that is computed here was asked for and first scheduled; monotonic seconds."""

    asked_at: float
    began_at: float | None = None
    chunks: ChunkLog = field(default_factory=ChunkLog)


@dataclass(frozen=True, slots=True)
class _BegunChunk:
    """A chunk of a prompt in the step that is just computed."""

    times: _PromptTimes
    began_at: float
    token_begin: int
    token_end: int


class DecodeEngineLoop:
    """What the engine thread of a decode worker does.

    Args:
        scheduler: with its block manager.
        step_runner: the model.
        permits: shared with the receiver.
        publish: takes reports, in order; called in the engine thread, must not block.
        now: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: DecodeScheduler,
        step_runner: StepRunner,
        permits: PushPermits,
        publish: Callable[[events.StepReport], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._step_runner = step_runner
        self._permits = permits
        self._publish = publish
        self._now = now
        self._prompt_times: dict[WorkId, _PromptTimes] = {}
        self._pushes: dict[WorkId, commands.PushEnded] = {}
        self._published_load: WorkerLoad | None = None

    def handle(self, command: commands.Command) -> None:
        """Takes one command."""
        match command:
            case commands.ReserveBlocks(work):
                self._scheduler.reserve(work)
                # The permit must be there before the next command can end the reservation: opened after that, it would
                # let a writer into blocks that are others' by then.
                self._publish_report(())
                fault_point("decode.blocks_reserved", work)
            case commands.ComputePrompt(work_id):
                if self._scheduler.run_prompt(work_id):
                    self._prompt_times[work_id] = _PromptTimes(self._now())
            case commands.PushEnded(work_id, first_tokens, problem=problem):
                self._pushes[work_id] = command
                self._scheduler.push_ended(work_id, first_tokens, problem)
                self._publish_report(())
                self._pushes.pop(work_id, None)
            case commands.EndSequence(work_id, sequence):
                self._scheduler.finish_sequence(work_id, sequence)
            case commands.SetPaused(work_id, paused):
                self._scheduler.set_paused(work_id, paused)
            case commands.GiveUp(work_id):
                self._scheduler.cancel(work_id)
            case commands.Fail(work_id, kind, message):
                self._scheduler.fail(work_id, kind, message)

    def step(self) -> bool:
        """Schedules, runs, samples, publishes. False when there was nothing to compute."""
        step = self._scheduler.schedule()
        happened = self._scheduler.take_events()
        if happened or step is None:
            self._publish_events(happened, ())
        if step is None:
            return False
        begun = self._note_begun(step)
        fault_point("decode.step_begins", step)
        tokens = self._run(step)
        self._note_computed(begun)
        fault_point("decode.step_computed", tokens)
        self._publish_report(tokens)
        return True

    def fail_all(self) -> None:
        """Ends all works."""
        for work_id in self._scheduler.work_ids():
            self._scheduler.fail(work_id, FailureKind.INTERNAL, INTERNAL_MESSAGE)
        self._publish_report(())

    def _run(self, step: Step) -> tuple[SequenceToken, ...]:
        try:
            tokens = self._step_runner.run(step)
        except Exception as error:
            _log.exception("a step failed", num_sequences=len(step.entries))
            return self._run_apart(step, error)
        self._scheduler.complete(step, tokens)
        return tuple(tokens)

    def _run_apart(self, step: Step, error: Exception) -> tuple[SequenceToken, ...]:
        """A step failed: only those of its sequences fail that cannot be computed by themselves either."""
        parts = step.apart()
        if len(parts) == 1:
            self._scheduler.fail_step(step, *failure_of(error))
            return ()
        tokens: list[SequenceToken] = []
        for part in parts:
            if part.entries[0].sequence.block_table is None:
                continue  # of a work that has failed with an earlier part
            try:
                computed = self._step_runner.run(part)
            except Exception as error_of_part:
                _log.exception("a sequence fails its step", **part.entries[0].sequence.work.log_fields)
                self._scheduler.fail_step(part, *failure_of(error_of_part))
                continue
            self._scheduler.complete(part, computed)
            tokens.extend(computed)
        return tuple(tokens)

    def _note_begun(self, step: Step) -> list[_BegunChunk]:
        """Chunks of prompts that are computed here and begin now; with most steps there is none."""
        if not self._prompt_times:
            return []
        now = self._now()
        begun = []
        for entry in step.entries:
            times = self._prompt_times.get(entry.work_id)
            if times is not None:
                times.began_at = now if times.began_at is None else times.began_at
                begun.append(_BegunChunk(times, now, entry.token_begin, entry.token_end))
        return begun

    def _note_computed(self, begun: list[_BegunChunk]) -> None:
        for chunk in begun:
            first = chunk.times.began_at or chunk.began_at
            begin_ms, end_ms = (chunk.began_at - first) * 1000, (self._now() - first) * 1000
            chunk.times.chunks.add(ChunkTime(begin_ms, end_ms, chunk.token_begin, chunk.token_end))

    def _publish_report(self, tokens: tuple[SequenceToken, ...]) -> None:
        self._publish_events(self._scheduler.take_events(), tokens)

    def _publish_events(self, scheduler_events: list[events.SchedulerEvent], tokens: tuple[SequenceToken, ...]) -> None:
        happened = tuple(self._complete_event(event) for event in scheduler_events)
        load = self._scheduler.load()
        if happened or tokens or load != self._published_load:
            self._published_load = load
            self._publish(events.StepReport(happened, tokens, load))

    def _complete_event(self, event: events.SchedulerEvent) -> events.Event:
        """Adds what the scheduler does not know: tickets, sizes and times."""
        match event:
            case events.BlocksReserved(work, block_ids, num_cached_tokens):
                ticket = self._permits.open(work, block_ids, num_cached_tokens)
                return events.ReservationOpened(work.work_id, ticket, num_cached_tokens)
            case events.SequencesStarted(work_id):
                return self._measure_start(event, work_id)
            case events.WorkFailed(work_id) | events.WorkEnded(work_id):
                self._prompt_times.pop(work_id, None)
        return event

    def _measure_start(self, event: events.SequencesStarted, work_id: WorkId) -> events.SequencesStarted:
        if push := self._pushes.get(work_id):
            return replace(event, kv_bytes=push.kv_bytes, num_transferred_tokens=push.num_transferred_tokens)
        times = self._prompt_times.pop(work_id, None)
        if times is None or times.began_at is None:
            return event
        prefill_ms, queue_ms = (self._now() - times.asked_at) * 1000, (times.began_at - times.asked_at) * 1000
        return replace(event, prefill_ms=prefill_ms, queue_ms=queue_ms, chunks=times.chunks.times)
