"""Decode engine loop: what it adds to the scheduler, on a simulated pool."""

from collections.abc import Callable

import pytest

from decode_worker import commands
from decode_worker.engine_loop import DecodeEngineLoop
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling import events
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from kvrelay.core.job import FailureKind, JobId, SequenceToken
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.worker.commands import CancelJob, FailJob, JobEnded, JobFailed
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step import Step
from tests.support.jobs import make_job
from tests.support.simulated_pool import SimulatedPool, expected_output

JOB = make_job(list(range(5, 15)), max_tokens=4)


class SimulatedRunner:
    """In place of the model."""

    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self.poison: int | None = None
        """A step with this token fails, when it is all computed."""
        self.num_failures = 0

    def run(self, step: Step, on_layer_written: Callable[[int], None] | None = None) -> list[SequenceToken]:
        tokens = self._pool.run(step)
        if any(self.poison in entry.sequence.token_ids for entry in step.entries):
            self.num_failures += 1
            raise ValueError("poison")
        return tokens


class Bench:
    def __init__(self) -> None:
        self.blocks = BlockManager(8, 4)
        self.grants = WriteGrants()
        self.reports: list[events.StepReport] = []
        scheduler = DecodeScheduler(self.blocks, DecodeLimits(8, 8, 8), self.grants)
        self.runner = SimulatedRunner(SimulatedPool(8, 4))
        self.loop = DecodeEngineLoop(scheduler, self.runner, self.grants, self.reports.append)  # type: ignore[arg-type]

    def tokens_of(self, job_id: JobId) -> list[int]:
        tokens = (token for report in self.reports for token in report.tokens)
        return [token.token.token_id for token in tokens if token.job_id == job_id]

    def events(self) -> list[events.Event]:
        return [event for report in self.reports for event in report.events]


@pytest.mark.parametrize(
    "ending",
    [
        CancelJob(JOB.job_id),
        FailJob(JOB.job_id, FailureKind.DEADLINE, "late"),
        commands.EndSequence(JOB.job_id, 0),
    ],
    ids=lambda ending: type(ending).__name__,
)
def test_a_job_that_ends_within_the_turn_of_its_reservation_leaves_no_grant(ending: commands.Command) -> None:
    """As happens whenever both commands come in during one long step (I4)."""
    bench = Bench()
    bench.loop.handle(commands.ReserveBlocks(PreparedJob(JOB)))
    bench.loop.handle(ending)
    bench.loop.step()
    assert bench.blocks.num_used_blocks == 0
    assert len(bench.grants) == 0


def test_a_prompt_that_is_asked_for_after_its_job_has_ended_leaves_nothing() -> None:
    bench = Bench()
    bench.loop.handle(commands.ComputePrompt(JobId("b" * 32, 1)))
    assert not bench.loop._observer._prompts


def test_a_prompt_that_is_computed_here_is_timed() -> None:
    bench = Bench()
    bench.loop.handle(commands.ReserveBlocks(PreparedJob(JOB)))
    bench.loop.handle(commands.ComputePrompt(JOB.job_id))
    while bench.loop.step():
        pass
    [started] = [event for event in bench.events() if isinstance(event, events.SequencesStarted)]
    assert started.prefill_ms >= started.queue_ms > 0
    assert isinstance(bench.events()[-1], JobEnded)
    assert not bench.loop._observer._prompts


def test_only_the_sequence_fails_that_cannot_be_computed() -> None:
    bench = Bench()
    poisoned, innocent = (
        make_job([first, 6, 7], max_tokens=4, request_id=c * 32) for first, c in ((99, "a"), (5, "b"))
    )
    forked = make_job([8, 9, 10], max_tokens=4, request_id="c" * 32, num_sequences=2)
    bench.runner.poison = 99
    for job in (poisoned, innocent, forked):
        bench.loop.handle(commands.ReserveBlocks(PreparedJob(job)))
        bench.loop.handle(commands.ComputePrompt(job.job_id))
    while bench.loop.step():
        pass
    assert bench.runner.num_failures == 2, "together with the others, then apart"
    [failed] = [event for event in bench.events() if isinstance(event, JobFailed)]
    assert (failed.job_id, failed.kind) == (poisoned.job_id, FailureKind.INTERNAL)
    tokens: dict[tuple[JobId, int], list[int]] = {}
    for token in (token for report in bench.reports for token in report.tokens):
        tokens.setdefault((token.job_id, token.sequence), []).append(token.token.token_id)
    expected = {
        (job.job_id, number): expected_output(job, number) for job in (innocent, forked) for number in job.sequences
    }
    assert tokens == expected
    assert bench.blocks.num_used_blocks == 0


def test_a_paused_job_keeps_its_place_and_others_go_on() -> None:
    bench = Bench()
    paused, other = (make_job([first, 6, 7], max_tokens=4, request_id=c * 32) for first, c in ((4, "a"), (5, "b")))
    for job in (paused, other):
        bench.loop.handle(commands.ReserveBlocks(PreparedJob(job)))
        bench.loop.handle(commands.ComputePrompt(job.job_id))
    bench.loop.step()
    bench.loop.handle(commands.SetPaused(paused.job_id, True))
    while bench.loop.step():
        pass
    assert bench.tokens_of(other.job_id) == expected_output(other, 0)
    assert bench.tokens_of(paused.job_id) == expected_output(paused, 0)[:1]
    bench.loop.handle(commands.SetPaused(paused.job_id, False))
    while bench.loop.step():
        pass
    assert bench.tokens_of(paused.job_id) == expected_output(paused, 0)


def test_a_paused_job_can_be_given_up() -> None:
    bench = Bench()
    bench.loop.handle(commands.ReserveBlocks(PreparedJob(JOB)))
    bench.loop.handle(commands.ComputePrompt(JOB.job_id))
    bench.loop.step()
    bench.loop.handle(commands.SetPaused(JOB.job_id, True))
    bench.loop.handle(CancelJob(JOB.job_id))
    bench.loop.step()
    assert bench.blocks.num_used_blocks == 0
