"""`python -m tests.simulation`: runs seeds, on all cores when told so, and says how to replay those
that fail.
"""

import multiprocessing
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.simulation.plan import Fault
from tests.simulation.run import Outcome, run_seed, without_garbage_collection

SEEDS_PER_JOB = 20
MAX_SHOWN = 20
_HASH_SEED = "PYTHONHASHSEED"


def run_job(seeds: range) -> list[Outcome]:
    """A few seeds, in a worker process."""
    return [without_garbage_collection(lambda seed=seed: run_seed(seed)) for seed in seeds]  # type: ignore[misc]


def run_all(seeds: range, num_processes: int) -> Iterator[Outcome]:
    """Outcomes as they come."""
    jobs = [seeds[begin : begin + SEEDS_PER_JOB] for begin in range(0, len(seeds), SEEDS_PER_JOB)]
    if num_processes == 1:
        for job in jobs:
            yield from run_job(job)
        return
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        for outcomes in pool.imap_unordered(run_job, jobs):
            yield from outcomes


def replay_command(seed: int) -> str:
    """What shows a seed again, message by message."""
    return f"python -m tests.simulation --seed {seed} --trace"


def main(
    seeds: Annotated[str, typer.Option(help="First and last but one seed, as in 0:10000.")] = "0:1000",
    seed: Annotated[int | None, typer.Option(help="One seed instead.")] = None,
    trace: Annotated[bool, typer.Option(help="Show whatever happens; with --seed.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes to run seeds in.")] = 1,
    outcomes_path: Annotated[Path | None, typer.Option("--outcomes", help="Write all outcomes there, pickled.")] = None,
) -> None:
    """Runs simulated clusters, one for each seed, and checks what the design promises."""
    # sets of strings have an order of their own in every process otherwise
    if os.environ.get(_HASH_SEED) != "0":
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, _HASH_SEED: "0"}
        )
    console = Console()
    if seed is not None:
        chosen = range(seed, seed + 1)
    else:
        begin, _, end = seeds.partition(":")
        chosen = range(int(begin), int(end))
    if trace:
        outcomes = [run_seed(number, lambda line: print(line, flush=True)) for number in chosen]
        report(console, outcomes, None)
    else:
        started = time.perf_counter()
        outcomes = _run_with_progress(console, chosen, processes)
        report(console, outcomes, time.perf_counter() - started)
    if outcomes_path is not None:
        outcomes_path.write_bytes(pickle.dumps(sorted(outcomes, key=lambda outcome: outcome.seed)))
    raise typer.Exit(any(outcome.problems for outcome in outcomes))


def _run_with_progress(console: Console, seeds: range, num_processes: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("seeds", total=len(seeds))
        for outcome in run_all(seeds, num_processes):
            outcomes.append(outcome)
            progress.advance(task)
            if outcome.problems:
                progress.console.print(f"seed {outcome.seed}: {outcome.problems[0]}", markup=False)
    return outcomes


def report(console: Console, outcomes: list[Outcome], seconds: float | None) -> None:
    """What was run, which faults had an effect, and how to replay what failed."""
    fired: Counter[Fault] = sum((outcome.fired for outcome in outcomes), Counter())
    table = Table("fault", "seeds", "times", title="faults that had an effect")
    for fault in Fault:
        table.add_row(fault.value, str(sum(fault in outcome.fired for outcome in outcomes)), str(fired[fault]))
    console.print(table)
    failed = [outcome for outcome in outcomes if outcome.problems]
    rate = "" if seconds is None else f", {len(outcomes) / seconds * 60:.0f} a minute"
    console.print(
        f"{len(outcomes)} seeds{rate}; {sum(outcome.num_requests for outcome in outcomes)} requests,"
        f" {sum(outcome.num_succeeded for outcome in outcomes)} succeeded,"
        f" {sum(outcome.num_attempts for outcome in outcomes)} further attempts,"
        f" {sum(outcome.virtual_s for outcome in outcomes):.0f} s of virtual time"
    )
    for outcome in failed[:MAX_SHOWN]:
        console.print(f"{outcome.problems[0]}\n    {replay_command(outcome.seed)}", markup=False, style="red")
    console.print(f"{len(failed)} seeds failed")


if __name__ == "__main__":
    typer.run(main)
