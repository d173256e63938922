"""Runs a scheduler's steps, and fails only the jobs that cannot be computed.

step --> without sequences that lack a mask --> run --> complete
                                                 |
                           an error: each entry alone --> complete or fail
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from kvrelay.core.job import FailureKind, JobId, SequenceToken
from kvrelay.worker.mask_desk import GrammarFailure, MaskDesk
from kvrelay.worker.step import Step
from kvrelay.worker.step_observer import StepObserver
from kvrelay.worker.step_runner import INTERNAL_MESSAGE, StepRunner, failure_of

OnLayerWritten = Callable[[int], None]

_log = structlog.get_logger(__name__)


class StepScheduler(Protocol):
    def complete(self, step: Step, tokens: Sequence[SequenceToken]) -> None: ...

    def fail(self, job_id: JobId, kind: FailureKind, message: str) -> None: ...

    def job_ids(self) -> list[JobId]: ...


class StepExecutor:
    """Used by the engine thread. Without `masks`, that thread makes all masks."""

    def __init__(
        self, scheduler: StepScheduler, step_runner: StepRunner, observer: StepObserver, masks: MaskDesk | None
    ) -> None:
        self._scheduler = scheduler
        self._step_runner = step_runner
        self._observer = observer
        self._masks = masks

    def collect_masks(self) -> None:
        """Call before `schedule`."""
        if self._masks is not None:
            self._fail_grammars(self._masks.collect())

    def run(
        self, step: Step, on_layers_of: Callable[[Step], OnLayerWritten | None] = lambda step: None
    ) -> tuple[SequenceToken, ...]:
        """`on_layers_of` makes the layer callback of a step, or of one entry, before it runs."""
        fitting = self._fit(step)
        if fitting is None:
            return ()
        self._observer.on_step_begins(fitting)
        tokens = self._run(fitting, on_layers_of)
        self._observer.on_step_computed(fitting, tokens)
        return tokens

    def fail_all(self) -> None:
        for job_id in self._scheduler.job_ids():
            self._scheduler.fail(job_id, FailureKind.INTERNAL, INTERNAL_MESSAGE)

    def _fit(self, step: Step) -> Step | None:
        """None if only copies were left; they are made now."""
        if self._masks is None:
            return step
        fitting, failures = self._masks.fit(step)
        self._fail_grammars(failures)
        if fitting.entries:
            return fitting
        if step.copies:
            self._step_runner.copy_blocks(step.copies)
        return None

    def _run(self, step: Step, on_layers_of: Callable[[Step], OnLayerWritten | None]) -> tuple[SequenceToken, ...]:
        try:
            tokens = self._step_runner.run(step, on_layers_of(step))
        except Exception as error:
            if len(step.entries) > 1:
                _log.exception("a step failed", num_sequences=len(step.entries))
                return tuple(token for part in step.split() for token in self._run_part(part, on_layers_of))
            _log.exception("a sequence fails its step", **step.entries[0].sequence.job.log_fields)
            self._scheduler.fail(step.entries[0].job_id, *failure_of(error))
            return ()
        self._scheduler.complete(step, tokens)
        return tuple(tokens)

    def _run_part(self, part: Step, on_layers_of: Callable[[Step], OnLayerWritten | None]) -> tuple[SequenceToken, ...]:
        """Skips an entry whose job failed with an earlier one."""
        return () if part.entries[0].sequence.block_table is None else self._run(part, on_layers_of)

    def _fail_grammars(self, failures: Sequence[GrammarFailure]) -> None:
        for failure in failures:
            kind, message = failure_of(failure.error)
            _log.info(
                "a response format cannot be followed",
                request_id=failure.job_id.request_id,
                exc_info=kind is FailureKind.INTERNAL,
            )
            self._scheduler.fail(failure.job_id, kind, message)
