"""Disaggregated against colocated workers on equal threads: first the colocated one's best chunk,
then both in turns.

Under several objectives the best chunk differs, so all take part in every round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.measurement import Objective
from benchmarks.serve_cluster import ClusterPlan, running
from benchmarks.serve_load import LoadOptions, LoadResult, goodput, run_loads, warm_up
from kvrelay.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Comparison:
    """Goodput in good requests per second."""

    objective: Objective
    disaggregated: str
    colocated: str
    disaggregated_goodput: float
    colocated_goodput: float

    @property
    def ratio(self) -> float | None:
        """None where the colocated cluster kept the objective of no request."""
        return self.disaggregated_goodput / self.colocated_goodput if self.colocated_goodput else None


async def measure_plan(plan: ClusterPlan, options: LoadOptions, round_number: int) -> list[LoadResult]:
    """Starts a cluster, warms it up and runs a round."""
    async with running(plan) as address, AsyncClient(address) as client:
        await warm_up(client, options)
        return await run_loads(client, options, plan.name, round_number)


async def best_of(
    plans: list[ClusterPlan], options: LoadOptions, progress: Callable[[str], None]
) -> tuple[ClusterPlan, list[LoadResult]]:
    """The plan with the highest goodput in one round; of equal ones the one with the shortest gaps.
    With all results.
    """
    tried = []
    results = []
    for plan in plans:
        progress(f"trying {plan.name}")
        of_plan = await measure_plan(plan, options, 0)
        results += of_plan
        longest_ms = max(result.summary.itl_ms.p99 if result.summary.itl_ms else 0.0 for result in of_plan)
        tried.append((goodput(of_plan), -longest_ms, plan))
    return max(tried, key=lambda item: item[:2])[2], results


async def compare(
    disaggregated: ClusterPlan,
    colocated: Sequence[ClusterPlan],
    options: LoadOptions,
    rounds: int,
    progress: Callable[[str], None],
) -> tuple[list[Comparison], list[LoadResult]]:
    """All in turns, each started anew in every round; under each objective, with the colocated one
    that does best there.
    """
    plans = [disaggregated, *colocated]
    results: dict[str, list[LoadResult]] = {plan.name: [] for plan in plans}
    for round_number in range(1, rounds + 1):
        # In changing order, so that a machine that gets slower or faster favours neither.
        for plan in plans[:: 1 if round_number % 2 else -1]:
            progress(f"round {round_number} of {rounds}: {plan.name}")
            results[plan.name] += await measure_plan(plan, options, round_number)
    return compare_results(disaggregated.name, results, options.objectives), [
        each for of_plan in results.values() for each in of_plan
    ]


def compare_results(
    disaggregated: str, results: Mapping[str, Sequence[LoadResult]], objectives: Sequence[Objective]
) -> list[Comparison]:
    """One for each objective, with the best of the other clusters under it.

    Args:
        disaggregated: name of a cluster.
        results: of each cluster.
        objectives: those of the results, in their order.
    """
    comparisons = []
    for number, objective in enumerate(objectives):
        goodputs = {name: goodput(of_plan, number) for name, of_plan in results.items()}
        ours = goodputs.pop(disaggregated)
        best = max(goodputs, key=goodputs.__getitem__)
        comparisons.append(Comparison(objective, disaggregated, best, ours, goodputs[best]))
    return comparisons
