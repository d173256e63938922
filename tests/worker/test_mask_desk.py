"""Masks that take long are made beside the engine: neighbours go on, steps have a bound, a response
format fails its own work.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import pytest

from decode_worker import commands as decode_commands
from decode_worker.engine_loop import DecodeEngineLoop
from decode_worker.receiving.write_grants import WriteGrants
from decode_worker.scheduling import events
from decode_worker.scheduling.scheduler import DecodeLimits, DecodeScheduler
from kvrelay.core.job import FailureKind, Job, SequenceToken
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.errors import InvalidRequestError
from kvrelay.kv_cache.block_manager import BlockCopy, BlockManager
from kvrelay.structured_output.grammar import CompiledGrammar
from kvrelay.worker import mask_desk
from kvrelay.worker.commands import CancelJob, JobEnded, JobFailed, MasksMade
from kvrelay.worker.mask_desk import MaskDesk
from kvrelay.worker.sequence import PreparedJob
from kvrelay.worker.step import Step
from prefill_worker import commands as prefill_commands
from prefill_worker.engine_loop import PrefillEngineLoop
from prefill_worker.scheduling.events import PromptComputed, Report
from prefill_worker.scheduling.scheduler import PrefillLimits, PrefillScheduler
from tests.support.jobs import make_job
from tests.support.simulated_pool import SimulatedPool, expected_output

BOUND_S = 20.0
SPEC = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 40, 4096, (3,), "f")


class Matcher:
    """Stands for a way through a grammar. Its masks are made where it may be slow, and only when
    they are let go on.
    """

    def __init__(self, grammar: "Grammar") -> None:
        self.grammar = grammar
        self._made: int | None = None

    @property
    def is_slow(self) -> bool:
        return self.grammar.is_slow

    def has_masks(self, num_output_tokens: int, drafts: Sequence[int], ending: Iterable[int]) -> bool:
        return self._made == num_output_tokens

    def masks(self, output: Sequence[int], drafts: Sequence[int], ending: Iterable[int]) -> list[bytes | None]:
        if not self.has_masks(len(output), drafts, ending):
            self.grammar.threads.append(threading.current_thread().name)
            self.grammar.asked.set()
            if self.grammar.is_slow:
                assert self.grammar.go_on.wait(BOUND_S)
            if self.grammar.error is not None:
                raise self.grammar.error
            self._made = len(output)
        return [b"\xff"]


class Grammar:
    def __init__(self, *, is_slow: bool = False, error: Exception | None = None) -> None:
        self.is_slow = is_slow
        self.error = error
        self.threads: list[str] = []
        self.asked, self.go_on = threading.Event(), threading.Event()

    def matcher(self) -> Matcher:
        return Matcher(self)


class Runner:
    def __init__(self, pool: SimulatedPool) -> None:
        self._pool = pool
        self.num_rows: list[int] = []

    def run(self, step: Step, on_layer_written: Callable[[int], None] | None = None) -> list[SequenceToken]:
        self.num_rows.append(len(step.entries))
        return self._pool.run(step)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        self._pool.copy(copies)


class Bench:
    """A decode worker's engine loop, turned by hand."""

    def __init__(self) -> None:
        self.blocks = BlockManager(64, 4)
        self.woken = threading.Semaphore(0)
        self.reports: list[events.StepReport] = []
        scheduler = DecodeScheduler(self.blocks, DecodeLimits(64, 64, 64), grants := WriteGrants())
        self.runner = Runner(SimulatedPool(64, 4))
        masks = MaskDesk(SPEC, self.woken.release)
        runner: Any = self.runner
        self.loop = DecodeEngineLoop(scheduler, runner, grants, self.reports.append, masks=masks)

    def start(self, *jobs: PreparedJob) -> list[Job]:
        for job in jobs:
            self.loop.handle(decode_commands.ReserveBlocks(job))
            self.loop.handle(decode_commands.ComputePrompt(job.job.job_id))
        return [job.job for job in jobs]

    def turn(self) -> None:
        """Until there is nothing to do."""
        while self.loop.step():
            pass

    def turn_until(self, is_over: Callable[[], bool]) -> None:
        """Also when masks are made meanwhile."""
        self.turn()
        while not is_over():
            assert self.woken.acquire(timeout=BOUND_S), "nobody wakes the engine"
            self.turn()

    def tokens_of(self, job: Job, number: int = 0) -> list[int]:
        tokens = (token for report in self.reports for token in report.tokens)
        return [token.token.token_id for token in tokens if (token.job_id, token.sequence) == (job.job_id, number)]

    def ends(self) -> list[events.Event]:
        every = [event for report in self.reports for event in report.events]
        return [event for event in every if isinstance(event, JobFailed | JobEnded)]


def formed(name: str, grammar: Grammar, max_tokens: int = 6, **values: Any) -> PreparedJob:
    return PreparedJob(make_job([ord(name), 6, 7], max_tokens, name * 32, **values), cast(CompiledGrammar, grammar))


def test_neighbours_get_their_tokens_while_a_mask_is_made() -> None:
    bench, slow = Bench(), Grammar(is_slow=True)
    jobs = bench.start(formed("a", slow), formed("b", Grammar()), PreparedJob(make_job([5, 6, 7], 20, "c" * 32)))
    bench.turn()
    assert slow.asked.wait(BOUND_S)
    assert [len(bench.tokens_of(job)) for job in jobs] == [0, 6, 20]
    slow.go_on.set()
    bench.turn_until(lambda: len(bench.ends()) == len(jobs))
    assert all(bench.tokens_of(job) == expected_output(job, 0) for job in jobs)
    assert set(slow.threads) == {"masks"}
    assert bench.blocks.num_used_blocks == 0


def test_sequences_that_share_a_prompt_and_sit_out_say_what_they_would_have_said() -> None:
    bench, slow = Bench(), Grammar(is_slow=True)
    slow.go_on.set()
    [job] = bench.start(formed("a", slow, num_sequences=4))
    bench.turn_until(lambda: len(bench.ends()) == 1)
    assert all(bench.tokens_of(job, number) == expected_output(job, number) for number in job.sequences)
    assert bench.blocks.num_used_blocks == 0


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            InvalidRequestError("response_format.regex", "is too much"),
            FailureKind.INVALID,
            "response_format.regex is too much",
        ),
        (
            ZeroDivisionError("secret"),
            FailureKind.INTERNAL,
            "the worker failed to compute the step; its log has the detail",
        ),
    ],
)
def test_a_form_that_fails_ends_its_own_job(is_slow: bool, error: Exception, kind: FailureKind, message: str) -> None:
    bench, failing = Bench(), Grammar(is_slow=is_slow, error=error)
    failing.go_on.set()
    job, neighbour = bench.start(formed("a", failing, num_sequences=2), PreparedJob(make_job([5, 6, 7], 6, "c" * 32)))
    bench.turn_until(lambda: len(bench.ends()) == 2)
    assert JobFailed(job.job_id, kind, message) in bench.ends()
    assert bench.tokens_of(neighbour) == expected_output(neighbour, 0)
    assert len(bench.runner.num_rows) == 6, "no step was computed twice"
    assert bench.blocks.num_used_blocks == 0


def test_a_step_ends_when_its_masks_have_cost_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many response formats turn out to be slow in it."""
    monkeypatch.setattr(mask_desk, "MAX_STEP_S", -1.0)
    bench, grammar = Bench(), Grammar()
    jobs = bench.start(*(formed(name, grammar) for name in "abcd"))
    bench.turn_until(lambda: len(bench.ends()) == len(jobs))
    assert all(bench.tokens_of(job) == expected_output(job, 0) for job in jobs)
    assert set(grammar.threads) == {"masks"}


def test_a_job_that_is_given_up_while_its_mask_is_made_holds_nothing() -> None:
    bench, slow = Bench(), Grammar(is_slow=True, error=InvalidRequestError("response_format.regex", "is too much"))
    [job] = bench.start(formed("a", slow))
    bench.turn()
    assert slow.asked.wait(BOUND_S)
    bench.loop.handle(CancelJob(job.job_id))
    bench.turn()
    assert bench.blocks.num_used_blocks == 0
    slow.go_on.set()
    assert bench.woken.acquire(timeout=BOUND_S)
    bench.turn()
    assert bench.ends() == [JobEnded(job.job_id)]


def test_prompts_of_a_prefill_worker_sit_out_as_well() -> None:
    slow, woken, reports = Grammar(is_slow=True), threading.Semaphore(0), list[Report]()
    blocks = BlockManager(64, 4)
    runner: Any = Runner(SimulatedPool(64, 4))
    scheduler = PrefillScheduler(blocks, SPEC, PrefillLimits(64, 64))
    desk = MaskDesk(SPEC, woken.release)
    loop = PrefillEngineLoop(scheduler, runner, reports.append, lambda layer, written: None, masks=desk)
    jobs = formed("a", slow), formed("b", Grammar())

    def turn() -> list[str]:
        while loop.step():
            pass
        computed = [event for report in reports for event in report.events if isinstance(event, PromptComputed)]
        return [event.job_id.request_id[0] for event in computed]

    for job in jobs:
        loop.handle(prefill_commands.StartPrompt(job, 0.0))
    assert turn() == ["b"]
    slow.go_on.set()
    assert woken.acquire(timeout=BOUND_S)
    loop.handle(MasksMade())
    assert turn() == ["b", "a"]
