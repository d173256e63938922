"""Runs of the simulation, and that it is what it claims to be: the same again for the same seed,
with every fault in it.
"""

import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.__main__ import replay_command
from tests.simulation.plan import Fault
from tests.simulation.run import Outcome, run_seed

NUM_SEEDS = 150
NUM_REPLAYED = 15
NUM_SOAK_SEEDS = 10_000
RARE_FAULTS = frozenset({Fault.CHUNK_FOREIGN, Fault.RESUMED_ELSEWHERE, Fault.CHUNK_REPLAYED, Fault.PUSH_BROKEN})
"""Those that a few hundred seeds may miss; ten thousand must have them many times."""
MIN_SEEDS_WITH_EACH = 20


def check(outcomes: list[Outcome]) -> Counter[Fault]:
    """How many seeds had each fault."""
    failed = [f"{outcome.problems[0]}\n    {replay_command(outcome.seed)}" for outcome in outcomes if outcome.problems]
    assert not failed, f"{len(failed)} of {len(outcomes)} seeds failed:\n" + "\n".join(failed[:10])
    return sum((Counter(set(outcome.fired)) for outcome in outcomes), Counter())


def run_in_another_process(seeds: range, num_processes: int, folder: Path) -> list[Outcome]:
    """As a user runs them, in a process whose sets have the order that a replay has."""
    path = folder / f"outcomes-{seeds.start}-{seeds.stop}"
    command = [
        sys.executable,
        "-m",
        "tests.simulation",
        f"--seeds={seeds.start}:{seeds.stop}",
        f"--processes={num_processes}",
    ]
    subprocess.run([*command, f"--outcomes={path}"], check=False, capture_output=True)
    outcomes: list[Outcome] = pickle.loads(path.read_bytes())
    assert [outcome.seed for outcome in outcomes] == list(seeds)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Of the first few hundred seeds."""
    return run_in_another_process(range(NUM_SEEDS), 1, tmp_path_factory.mktemp("seeds"))


def test_no_seed_breaks_a_promise(outcomes: list[Outcome]) -> None:
    num_seeds = check(outcomes)
    assert set(Fault) - RARE_FAULTS <= set(num_seeds), "a fault that never strikes is not survived"
    assert sum(outcome.num_succeeded for outcome in outcomes) > NUM_SEEDS
    assert sum(outcome.num_expected_tokens for outcome in outcomes) > 0, "gateways know no cache"
    assert sum(outcome.num_attempts for outcome in outcomes) > NUM_SEEDS / 4, (
        "faults that cost no attempt strike nobody"
    )


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_seed_of_ten_thousand_breaks_a_promise(tmp_path: Path) -> None:
    num_seeds = check(run_in_another_process(range(NUM_SOAK_SEEDS), os.cpu_count() or 1, tmp_path))
    rare = {fault.value: num_seeds[fault] for fault in Fault if num_seeds[fault] < MIN_SEEDS_WITH_EACH}
    assert not rare, "faults that struck in too few seeds"


def test_a_seed_runs_the_same_again(outcomes: list[Outcome], tmp_path: Path) -> None:
    again = run_in_another_process(range(NUM_REPLAYED), 2, tmp_path)
    assert [outcome.digest for outcome in again] == [outcome.digest for outcome in outcomes[:NUM_REPLAYED]]
    assert len({outcome.digest for outcome in again}) == NUM_REPLAYED


def test_a_seed_that_fails_says_how_to_see_it_again() -> None:
    assert replay_command(7) == "python -m tests.simulation --seed 7 --trace"
    lines: list[str] = []
    run_seed(7, lines.append)
    assert any("fault: " in line for line in lines)
    assert any("reserve" in line for line in lines)
