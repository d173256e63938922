"""The load that `bench serve` puts on one cluster, and its summaries. Knows no process and no
table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from benchmarks.load import LoadRun, run_load, run_streams_under_prompts
from benchmarks.measurement import Objective, RequestRecord, Summary, goodput_of, summarize
from benchmarks.workload import PlannedRequest, WorkloadPart, plan_requests
from kvrelay.client import AsyncClient

SEEDS_PER_ROUND = 1000
"""Rounds have prompts of their own, so that no prefix cache shortens them."""
WARM_UP_SEED = -1
FIRST_LONG_PROMPT_S = 2.0
"""When the streams have begun to decode."""


@dataclass(frozen=True, slots=True)
class LongPrompts:
    """Prompts that arrive among streams: one every so many seconds, at most so many."""

    workload: tuple[WorkloadPart, ...]
    every_s: float
    most: int


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is asked of a cluster.

    rates: requests per second of open loops, one load for each; empty: a closed loop of
    `concurrency`.
    long_prompts: with them the requests are streams that run all at once, first alone and then with
    the prompts among them.
    objectives: the first is that of the summaries; goodput is measured under each.
    """

    workload: tuple[WorkloadPart, ...]
    num_requests: int
    concurrency: int
    rates: tuple[float, ...]
    long_prompts: LongPrompts | None
    objectives: tuple[Objective, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A load, or the requests of one kind in it."""

    cluster: str
    round: int
    load: str
    kind: str
    """Empty for all of the load."""
    offered_requests_per_s: float | None
    summary: Summary
    goodputs_requests_per_s: tuple[float, ...]
    """Under each of the objectives."""


async def warm_up(client: AsyncClient, options: LoadOptions) -> None:
    """A request of each kind, not counted."""
    parts = options.workload + (options.long_prompts.workload if options.long_prompts else ())
    for part in parts:
        await run_load(client, plan_requests([part], 1, WARM_UP_SEED))


async def run_loads(client: AsyncClient, options: LoadOptions, cluster: str, round_number: int) -> list[LoadResult]:
    """All loads of a round, one after the other."""
    seed = options.seed + SEEDS_PER_ROUND * round_number
    if options.long_prompts is not None:
        return await _run_streams(client, options, options.long_prompts, cluster, round_number, seed)
    results = []
    for number, rate in enumerate(options.rates):
        requests = plan_requests(options.workload, options.num_requests, seed + number, rate)
        run = await run_load(client, requests)
        results += results_of(run, options, cluster, round_number, f"{rate:g} requests/s", rate)
    if not options.rates:
        requests = plan_requests(options.workload, options.num_requests, seed)
        run = await run_load(client, requests, options.concurrency)
        results += results_of(run, options, cluster, round_number, f"{options.concurrency} at once", None)
    return results


async def _run_streams(
    client: AsyncClient, options: LoadOptions, long_prompts: LongPrompts, cluster: str, round_number: int, seed: int
) -> list[LoadResult]:
    streams = plan_requests(options.workload, options.num_requests, seed)
    alone = await run_load(client, streams)
    streams = plan_requests(options.workload, options.num_requests, seed + 1)
    mixed = await run_streams_under_prompts(client, streams, _at_intervals(long_prompts, seed + 2))
    num_streams = len(streams)
    with_prompts = LoadRun(mixed.records[:num_streams], mixed.wall_s)
    results = results_of(alone, options, cluster, round_number, "streams alone", None)
    results += results_of(with_prompts, options, cluster, round_number, "streams among long prompts", None)
    if prompts := mixed.records[num_streams:]:
        results += results_of(LoadRun(prompts, mixed.wall_s), options, cluster, round_number, "long prompts", None)
    return results


def _at_intervals(long_prompts: LongPrompts, seed: int) -> list[PlannedRequest]:
    planned = plan_requests(long_prompts.workload, long_prompts.most, seed)
    times_s = (FIRST_LONG_PROMPT_S + number * long_prompts.every_s for number in range(long_prompts.most))
    return [replace(request, at_s=at_s) for request, at_s in zip(planned, times_s, strict=True)]


def results_of(
    run: LoadRun, options: LoadOptions, cluster: str, round_number: int, load: str, rate: float | None
) -> list[LoadResult]:
    """All of the load, and each of its kinds where there are several."""
    kinds = sorted({record.kind for record in run.records})

    def result(kind: str, records: Sequence[RequestRecord], own_rate: float | None) -> LoadResult:
        summary = summarize(records, run.wall_s, options.objectives[0], own_rate)
        goodputs = tuple(goodput_of(records, run.wall_s, objective, own_rate) for objective in options.objectives)
        return LoadResult(cluster, round_number, load, kind, own_rate, summary, goodputs)

    results = [result("", run.records, rate)]
    for kind in kinds if len(kinds) > 1 else ():
        records = [record for record in run.records if record.kind == kind]
        results.append(result(kind, records, rate * len(records) / len(run.records) if rate is not None else None))
    return results


def goodput(results: Sequence[LoadResult], objective: int = 0) -> float:
    """Most good requests per second over the loads of one cluster, each the mean of its rounds,
    under one of the objectives.
    """
    loads: dict[str, list[float]] = {}
    for result in results:
        if not result.kind:
            loads.setdefault(result.load, []).append(result.goodputs_requests_per_s[objective])
    return max(fmean(values) for values in loads.values())
