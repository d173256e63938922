"""Runs of the simulation, and that it is what it claims to be: the same again for the same seed, with every fault in it."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.__main__ import replay_command, run_all
from tests.simulation.plan import Fault
from tests.simulation.run import Outcome, run_seed, without_garbage_collection

NUM_SEEDS = 400
NUM_SOAK_SEEDS = 10_000
RARE_FAULTS = frozenset({Fault.CHUNK_FOREIGN, Fault.RESUMED_ELSEWHERE, Fault.CHUNK_REPLAYED, Fault.PUSH_BROKEN})
"""Those that a few hundred seeds may miss; ten thousand must have them many times."""
MIN_SEEDS_WITH_EACH = 20


def check(outcomes: list[Outcome]) -> Counter[Fault]:
    """How many seeds had each fault."""
    failed = [f"{outcome.problems[0]}\n    {replay_command(outcome.seed)}" for outcome in outcomes if outcome.problems]
    assert not failed, f"{len(failed)} of {len(outcomes)} seeds failed:\n" + "\n".join(failed[:10])
    return sum((Counter(set(outcome.fired)) for outcome in outcomes), Counter())


def test_no_seed_breaks_a_promise() -> None:
    outcomes = [without_garbage_collection(lambda seed=seed: run_seed(seed)) for seed in range(NUM_SEEDS)]  # type: ignore[misc]
    num_seeds = check(outcomes)
    assert set(Fault) - RARE_FAULTS <= set(num_seeds), "a fault that never strikes is not survived"
    assert sum(outcome.num_succeeded for outcome in outcomes) > NUM_SEEDS
    assert sum(outcome.num_attempts for outcome in outcomes) > NUM_SEEDS / 4, "faults that cost no attempt strike nobody"


@pytest.mark.soak
def test_no_seed_of_ten_thousand_breaks_a_promise() -> None:
    num_seeds = check(list(run_all(range(NUM_SOAK_SEEDS), os.cpu_count() or 1)))
    rare = {fault.value: num_seeds[fault] for fault in Fault if num_seeds[fault] < MIN_SEEDS_WITH_EACH}
    assert not rare, "faults that struck in too few seeds"


def test_a_seed_runs_the_same_again() -> None:
    for seed in (3, 17, 42):
        assert run_seed(seed).digest == run_seed(seed).digest
    assert run_seed(3).digest != run_seed(4).digest


def test_a_seed_runs_the_same_in_a_process_with_another_order_of_sets() -> None:
    program = "from tests.simulation.run import run_seed; print([run_seed(seed).digest for seed in range(30)])"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": number}, capture_output=True, text=True, check=True
        ).stdout
        for number in ("0", "1")
    }
    assert len(digests) == 1


def test_a_seed_that_fails_says_how_to_see_it_again() -> None:
    assert replay_command(7) == "python -m tests.simulation --seed 7 --trace"
    lines: list[str] = []
    run_seed(7, lines.append)
    assert any("fault: " in line for line in lines)
    assert any("reserve" in line for line in lines)
