"""Routing strategies on one mix of conversations, in virtual time: cached tokens and time to first
token.
"""

from typing import Annotated

import typer

from benchmarks import report
from benchmarks.report import Report
from benchmarks.routing_simulation import ClusterShape, RoutingOutcome, simulate, simulate_best
from benchmarks.routing_workload import Mix, make_conversations
from benchmarks.statistics import percentile
from gateway.routing.routing import STRATEGIES

COLUMNS = [
    "routing",
    "requests",
    "hit tokens, %",
    "of the best, %",
    "mean TTFT, ms",
    "p90, ms",
    "on decode workers",
    "most index entries",
]
BEST = "one worker, infinite cache"


def command(
    conversations: Annotated[int, typer.Option(min=1, help="Conversations in all.")] = 600,
    rate: Annotated[float, typer.Option(min=0.01, help="Conversations that begin in a second.")] = 2.0,
    system_prompts: Annotated[int, typer.Option(min=1, help="System prompts, of Zipf's popularity.")] = 40,
    workers: Annotated[int, typer.Option(min=1, help="Prefill workers, and as many decode workers.")] = 4,
    gateways: Annotated[int, typer.Option(min=1, help="Gateways that see the same workers.")] = 3,
    blocks: Annotated[int, typer.Option(min=256, help="KV blocks of each worker.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 1,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """Compares the strategies of --routing in virtual time: cached tokens and time to first token."""
    output = Report("routing", json, plots)
    mix = Mix(num_conversations=conversations, conversations_per_s=rate, num_system_prompts=system_prompts)
    shape = ClusterShape(num_prefill=workers, num_decode=workers, num_gateways=gateways, num_blocks=blocks)
    talk = make_conversations(mix, seed)
    output.note(
        f"Virtual time: each worker computes {shape.tokens_per_s:,.0f} prompt tokens a second; "
        f"gateways hear of it {1000 * shape.report_s:.0f} ms later. Nothing here was measured on a clock."
    )
    best = simulate_best(talk, shape, seed)
    best.strategy = BEST
    outcomes = [best]
    for strategy in STRATEGIES:
        output.progress(f"routing {strategy}")
        outcomes.append(simulate(talk, shape, strategy, seed))
    output.add(*(summary(outcome, best) for outcome in outcomes))
    output.print_table("routing", COLUMNS, [list(summary(outcome, best).values()) for outcome in outcomes])
    output.finish()


def summary(outcome: RoutingOutcome, best: RoutingOutcome) -> dict[str, object]:
    return {
        "routing": outcome.strategy,
        "num_requests": outcome.num_requests,
        "hit_percent": 100 * outcome.num_hit_tokens / outcome.num_prompt_tokens,
        "percent_of_best": 100 * outcome.num_hit_tokens / best.num_hit_tokens,
        "mean_ttft_ms": 1000 * sum(outcome.ttft_s) / len(outcome.ttft_s),
        "p90_ttft_ms": 1000 * percentile(outcome.ttft_s, 90),
        "num_local": outcome.num_local,
        "max_index_entries": outcome.max_index_entries,
    }
