"""Tables of `kvrelay bench serve`: goodput of clusters, and the handoff gap."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.statistics import spread
from tools.benchmark_tables.documents import Document, Rows, table, verdict


def goodput(document: Document) -> Rows:
    loads: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for result in document.results:
        if "cluster" in result:
            key = (result["cluster"], result["load"], result["round"] == 0)
            loads.setdefault(key, []).append(result["summary"])
    rows = []
    for (cluster, load, is_choice), summaries in sorted(loads.items(), key=lambda item: (item[0][2], item[0][0])):
        times = (("ttft_ms", "mean", 1, 0.001), ("itl_ms", "mean", 0, 1), ("itl_ms", "p99", 0, 1))
        rows.append(
            [
                cluster + (", when its chunk was chosen" if is_choice else ""),
                load.partition(" ")[0],
                spread([each["goodput_requests_per_s"] for each in summaries]).text(3),
                *(
                    spread([each[name][part] for each in summaries]).text(decimals, factor)
                    for name, part, decimals, factor in times
                ),
            ]
        )
    titles = ["cluster", "requests/s", "good requests/s", "mean TTFT, s", "mean ITL, ms", "p99 of ITL, ms"]
    return [titles, *rows]


@table("goodput-short-prompts")
def goodput_of_short_prompts(document: Document) -> Rows:
    return [*goodput(document), _best_ratio(document, 1)]


@table("goodput-long-prompts")
def goodput_of_long_prompts(document: Document) -> Rows:
    return [*goodput(document), _best_ratio(document, 1.3)]


def _best_ratio(document: Document, goal: float) -> list[str]:
    (found,) = (result["ratio"] for result in document.results if "comparison" in result)
    what = f"best rate, disaggregated ÷ colocated (goal ≥ {goal:g})"
    return [what, "", f"{found:.2f}: {verdict(found, goal)}", "", "", ""]


@table("goodput-by-itl")
def goodput_by_gap(document: Document) -> Rows:
    comparisons = [result for result in document.results if "comparison" in result]
    bounds = [f"{each['comparison']['objective']['itl_ms']:g}" for each in comparisons]
    clusters: dict[str, list[Sequence[float]]] = {}
    for result in document.results:
        if "cluster" in result:
            clusters.setdefault(result["cluster"], []).append(result["goodputs_requests_per_s"])
    rows = [
        [cluster, *(f"{statistics.mean(values):.3f}" for values in zip(*rounds, strict=True))]
        for cluster, rounds in clusters.items()
    ]
    ratios = ["" if each["ratio"] is None else f"{each['ratio']:.2f}" for each in comparisons]
    return [["bound of the gaps' p99, ms", *bounds], *rows, ["**disaggregated ÷ best colocated**", *ratios]]


@table("handoff")
def handoff(document: Document) -> Rows:
    (summary,) = (result["summary"] for result in document.results)
    gap, itl = summary["handoff_gap_ms"], summary["itl_ms"]
    row = [f"{gap['p50']:.1f}", f"{gap['max']:.1f}", f"{itl['p50']:.1f}", f"{summary['handoff_gap_ratio']:.2f}"]
    row.append(f"≤ 2: {verdict(summary['handoff_gap_ratio'], 2, at_least=False)}")
    return [["handoff gap, median, ms", "longest, ms", "ITL, median, ms", "gap ÷ ITL", "goal"], row]
