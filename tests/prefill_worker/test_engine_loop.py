"""Prefill engine loop: what it adds to the scheduler, on a simulated pool."""

from collections.abc import Callable

import pytest

from kvrelay.core.job import FailureKind, JobId, SequenceToken
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.commands import JobFailed
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step import Step
from prefill_worker import commands
from prefill_worker.engine_loop import PrefillEngineLoop
from prefill_worker.scheduling import events
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from tests.support.jobs import make_job
from tests.support.simulated_pool import MODEL, SimulatedPool

NUM_LAYERS = 3


class PoisonedRunner:
    """In place of the model: steps with the poison fail behind the given layer; all others are
    computed.
    """

    def __init__(self, poison: int, last_layer: int) -> None:
        self._pool = SimulatedPool(16, 4)
        self._poison = poison
        self._last_layer = last_layer
        self.num_failures = 0

    def run(self, step: Step, on_layer_written: Callable[[int], None]) -> list[SequenceToken]:
        is_poisoned = any(self._poison in entry.sequence.token_ids for entry in step.entries)
        for layer in range(self._last_layer + 1 if is_poisoned else NUM_LAYERS):
            on_layer_written(layer)
        if is_poisoned:
            self.num_failures += 1
            raise ValueError("poison")
        return self._pool.run(step)


@pytest.mark.parametrize("last_layer", [0, NUM_LAYERS - 1])
def test_only_the_prompt_fails_that_cannot_be_computed_and_no_layer_is_announced_twice(last_layer: int) -> None:
    announced: list[tuple[JobId, int]] = []
    reports: list[events.Report] = []
    runner = PoisonedRunner(99, last_layer)

    def announce(layer: int, written: tuple[events.WrittenTokens, ...]) -> None:
        announced.extend((tokens.job_id, layer) for tokens in written)

    scheduler = PrefillScheduler(BlockManager(16, 4), MODEL, PrefillLimits(16, 8))
    loop = PrefillEngineLoop(scheduler, runner, reports.append, announce)  # type: ignore[arg-type]
    poisoned, innocent = (
        make_job([first, 6, 7], max_tokens=4, request_id=c * 32) for first, c in ((99, "a"), (5, "b"))
    )
    for job in (poisoned, innocent):
        loop.handle(commands.StartPrompt(PreparedJob(job), 0.0))
    while loop.step():
        pass
    assert runner.num_failures == 2, "together with the other, then apart"
    assert sorted(layer for job_id, layer in announced if job_id == innocent.job_id) == list(range(NUM_LAYERS))
    happened = [event for report in reports for event in report.events]
    assert [event.job_id for event in happened if isinstance(event, events.PromptComputed)] == [innocent.job_id]
    loop.handle(commands.SenderEnded(poisoned.job_id, "stopped"))
    loop.step()
    [failed] = [event for report in reports for event in report.events if isinstance(event, JobFailed)]
    assert (failed.job_id, failed.kind) == (poisoned.job_id, FailureKind.INTERNAL)
