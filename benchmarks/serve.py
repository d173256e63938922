"""`kvrelay bench serve`: load on a cluster as its clients see it.

A closed loop keeps so many requests running; an open loop sends them at the times of a Poisson
process, whatever comes of it. With long prompts, streams run while a long prompt arrives from time
to time, beside the same streams without any. With `--compare colocated`, disaggregated beside
colocated workers on as many threads, in turns, the latter at their best chunk.
"""

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.measurement import Objective
from benchmarks.report import Report
from benchmarks.serve_cluster import colocated_plans, plan_from
from benchmarks.serve_comparison import best_of, compare, measure_plan
from benchmarks.serve_load import LoadOptions, LongPrompts, run_loads, warm_up
from benchmarks.serve_tables import plot_rates, show_comparisons, show_goodputs, show_results
from benchmarks.workload import parse_workload
from kvrelay.cli.model_commands import prepare_models
from kvrelay.cli.setting_options import takes_settings
from kvrelay.client import AsyncClient
from kvrelay.config.settings import ClusterSettings, DecodeSettings, GatewaySettings, PrefillSettings
from kvrelay.config.sources import SettingsSources, setting_fields
from kvrelay.errors import ConfigError

_NOT_OFFERED = {
    *("host", "port", "peer_port", "advertise_address", "allowed_fingerprints", "redis_url", "restart"),
    *("log_level", "log_format", "lease_ms"),
}
_SETTINGS = (ClusterSettings, GatewaySettings, PrefillSettings, DecodeSettings)
_FIELDS = {name for settings in _SETTINGS for name in setting_fields(settings)} - _NOT_OFFERED


class Opponent(Enum):
    """What a cluster can be compared with."""

    COLOCATED = "colocated"


@takes_settings(*_SETTINGS, only=_FIELDS)
def command(
    sources: SettingsSources,
    address: Annotated[str | None, typer.Option(help="Gateway of a running cluster. Default: one is started.")] = None,
    workload: Annotated[
        str,
        typer.Option(
            metavar="LENGTHS", help="PROMPT->OUTPUT tokens: 128->64, 64..256->32, or 90%:128->64,10%:2048->32."
        ),
    ] = "256->64",
    requests: Annotated[int, typer.Option(min=1, metavar="INT", help="Requests of a load.")] = 32,
    concurrency: Annotated[int, typer.Option(min=1, metavar="INT", help="Closed loop: requests at once.")] = 4,
    rate: Annotated[
        str, typer.Option(metavar="FLOATS", help="Open loops: requests per second, one or several with commas.")
    ] = "",
    long: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Long prompts that arrive while the requests stream.")
    ] = "",
    long_every_s: Annotated[float, typer.Option(metavar="FLOAT", help="Time between two long prompts.")] = 8.0,
    long_most: Annotated[int, typer.Option(min=1, metavar="INT", help="Most long prompts.")] = 4,
    slo_ttft_ms: Annotated[float | None, typer.Option(metavar="FLOAT", help="A good request's longest TTFT.")] = None,
    slo_itl_ms: Annotated[
        str, typer.Option(metavar="FLOATS", help="Longest p99 of its gaps; several with commas: goodput under each.")
    ] = "",
    slo_tpot_ms: Annotated[float | None, typer.Option(metavar="FLOAT", help="Longest mean of its gaps.")] = None,
    opponent: Annotated[
        Opponent | None,
        typer.Option("--compare", metavar="NAME", help="colocated: as many threads without prefill workers."),
    ] = None,
    chunks: Annotated[
        str, typer.Option(metavar="INTS", help="Chunks of prompts to try colocated, with commas.")
    ] = "16,64,256,512",
    rounds: Annotated[int, typer.Option(min=1, metavar="INT", help="How often all is measured.")] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="INT", help="Of prompts, lengths and times.")] = 0,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """Load on a cluster: TTFT, ITL, throughput, goodput. Settings are those of the cluster that is
    started for it.
    """
    options = LoadOptions(
        parse_workload(workload),
        requests,
        concurrency,
        tuple(_numbers("--rate", rate)),
        LongPrompts(parse_workload(long), long_every_s, long_most) if long else None,
        _objectives(slo_ttft_ms, _numbers("--slo-itl-ms", slo_itl_ms), slo_tpot_ms),
        seed,
    )
    output = Report("serve", json, plots)
    if opponent is not None:
        if address is not None:
            raise ConfigError("--address and --compare exclude one another: clusters to compare are started here")
        asyncio.run(_compare(output, sources, options, [int(chunk) for chunk in _numbers("--chunks", chunks)], rounds))
    elif address is not None:
        asyncio.run(_measure_running(output, address, options, rounds))
    else:
        asyncio.run(_measure_started(output, sources, options, rounds))
    output.finish()


async def _measure_running(output: Report, address: str, options: LoadOptions, rounds: int) -> None:
    async with AsyncClient(address) as client:
        await warm_up(client, options)
        results = [
            result
            for number in range(rounds)
            for result in await run_loads(client, options, address, number + (rounds > 1))
        ]
    show_results(output, results, options.objectives)
    show_goodputs(output, results, options.objectives)
    plot_rates(output, results, options.objectives)


async def _measure_started(output: Report, sources: SettingsSources, options: LoadOptions, rounds: int) -> None:
    plan = plan_from(sources)
    prepare_models(plan.engines)
    results = []
    for number in range(rounds):
        output.progress(f"round {number + 1} of {rounds}: {plan.name}")
        results += await measure_plan(plan, options, number + (rounds > 1))
    show_results(output, results, options.objectives)
    show_goodputs(output, results, options.objectives)
    plot_rates(output, results, options.objectives)


async def _compare(
    output: Report, sources: SettingsSources, options: LoadOptions, chunks: Sequence[int], rounds: int
) -> None:
    plan = plan_from(sources)
    if not plan.prefill:
        raise ConfigError("--compare colocated needs prefill workers in the cluster that it is compared with")
    prepare_models(plan.engines)
    opponents = colocated_plans(plan, list(chunks))
    if len(options.objectives) == 1:
        best, tried = await best_of(opponents, options, output.progress)
        show_results(output, tried, options.objectives)
        opponents = [best]
    comparisons, results = await compare(plan, opponents, options, rounds, output.progress)
    show_results(output, results, options.objectives)
    show_comparisons(output, comparisons)
    plot_rates(output, results, options.objectives)


def _objectives(ttft_ms: float | None, itls_ms: Sequence[float], tpot_ms: float | None) -> tuple[Objective, ...]:
    """One for each bound of the ITL, or one without."""
    return tuple(Objective(ttft_ms, itl_ms, tpot_ms) for itl_ms in itls_ms) or (Objective(ttft_ms, None, tpot_ms),)


def _numbers(flag: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0.0]
    if not all(number > 0 for number in numbers):
        raise ConfigError(f"{flag} {text!r} is no list of numbers above 0")
    return numbers
