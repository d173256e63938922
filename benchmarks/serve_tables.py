"""How `bench serve` shows its results. Measures nothing."""

from collections.abc import Sequence
from statistics import fmean

from benchmarks.measurement import Distribution, Objective
from benchmarks.report import Report
from benchmarks.serve_comparison import Comparison
from benchmarks.serve_load import LoadResult

LOAD_COLUMNS = ["cluster", "load", "kind", "requests", "failed", "tok/s", "req/s", "good %", "goodput req/s"]
TIME_COLUMNS = ["cluster", "load", "kind", "", "mean", "p50", "p90", "p99", "max"]
PHASES = {
    "queue_ms": "queue",
    "prefill_ms": "prefill",
    "transfer_ms": "transfer",
    "exposed_transfer_ms": "exposed",
    "handoff_gap_ms": "handoff gap",
    "decode_ms": "decode",
    "time_to_first_token_ms": "first token",
    "total_ms": "total",
}


def show_results(output: Report, results: Sequence[LoadResult], objectives: Sequence[Objective]) -> None:
    """Rates, times and phases; what is good only where an objective says so."""
    output.add(*results)
    output.print_table(
        "Load", LOAD_COLUMNS, [_load_row(result, objectives[0].given) for result in results], num_text_columns=3
    )
    output.print_table(
        "Times, ms", TIME_COLUMNS, [row for result in results for row in _time_rows(result)], num_text_columns=4
    )
    phases = [[*_names(result), *_phase_cells(result)] for result in results if result.summary.phase_means_ms]
    columns = ["cluster", "load", "kind", *PHASES.values(), "on decode %"]
    output.print_table("Means of the phases, ms", columns, phases, num_text_columns=3)
    for error in sorted({error for result in results for error in result.summary.errors}):
        output.note(f"failed: {error}")


def show_goodputs(output: Report, results: Sequence[LoadResult], objectives: Sequence[Objective]) -> None:
    """Goodput under each of several objectives."""
    if len(objectives) < 2:
        return
    rows: list[list[object]] = [
        [*_names(result), _objective_text(objective), f"{goodput:.3f}"]
        for result in results
        for objective, goodput in zip(objectives, result.goodputs_requests_per_s, strict=True)
    ]
    columns = ["cluster", "load", "kind", "objective, ms", "goodput req/s"]
    output.print_table("Goodput by objective", columns, rows, num_text_columns=4)


def show_comparisons(output: Report, comparisons: Sequence[Comparison]) -> None:
    """Goodput and ratio under each objective."""
    output.add(*({"comparison": comparison, "ratio": comparison.ratio} for comparison in comparisons))
    rows: list[list[object]] = [
        [
            _objective_text(each.objective),
            f"{each.disaggregated_goodput:.3f}",
            each.colocated,
            f"{each.colocated_goodput:.3f}",
            "none is good" if each.ratio is None else f"{each.ratio:.2f}",
        ]
        for each in comparisons
    ]
    has_objective = any(each.objective.given for each in comparisons)
    objective, rate = ("objective, ms", "goodput req/s") if has_objective else ("", "req/s")
    title = "Goodput, good requests per second" if has_objective else "Requests per second that did not fail"
    output.print_table(title, [objective, comparisons[0].disaggregated, "best colocated", rate, "ratio"], rows)


def _objective_text(objective: Objective) -> str:
    bounds = {"TTFT": objective.ttft_ms, "ITL": objective.itl_ms, "TPOT": objective.tpot_ms}
    return ", ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)


def plot_rates(output: Report, results: Sequence[LoadResult], objectives: Sequence[Objective]) -> None:
    """Good requests per second by offered rate, where there are several rates; without an objective
    those that did not fail.
    """
    series: dict[str, list[LoadResult]] = {}
    for result in results:
        if not result.kind and result.offered_requests_per_s is not None:
            series.setdefault(result.cluster, []).append(result)
    if not any(len({result.offered_requests_per_s for result in points}) > 1 for points in series.values()):
        return
    curves = {name: _curve(points) for name, points in series.items()}
    name, what = ("serve-goodput", "good") if objectives[0].given else ("serve-requests", "served")
    title = "Goodput" if objectives[0].given else "Requests that did not fail"
    output.plot_lines(name, title, "offered requests/s", f"{what} requests/s", curves)


def _curve(results: list[LoadResult]) -> tuple[list[float], list[float]]:
    """Rates, and the mean goodput of each."""
    by_rate: dict[float, list[float]] = {}
    for result in results:
        by_rate.setdefault(_rate(result), []).append(result.summary.goodput_requests_per_s)
    rates = sorted(by_rate)
    return rates, [fmean(by_rate[rate]) for rate in rates]


def _rate(result: LoadResult) -> float:
    assert result.offered_requests_per_s is not None, "an open loop"
    return result.offered_requests_per_s


def _names(result: LoadResult) -> list[object]:
    return [f"{result.cluster}, round {result.round}" if result.round else result.cluster, result.load, result.kind]


def _load_row(result: LoadResult, has_objective: bool) -> list[object]:
    summary = result.summary
    return [
        *_names(result),
        summary.num_requests,
        summary.num_failed,
        summary.tokens_per_s,
        f"{summary.requests_per_s:.2f}",
        *([100 * summary.good_share, f"{summary.goodput_requests_per_s:.3f}"] if has_objective else [None, None]),
    ]


def _time_rows(result: LoadResult) -> list[list[object]]:
    summary = result.summary
    ratio = "" if summary.handoff_gap_ratio is None else f" ({summary.handoff_gap_ratio:.2f} x median ITL)"
    times = {
        "TTFT": summary.ttft_ms,
        "ITL": summary.itl_ms,
        "TPOT": summary.tpot_ms,
        f"token 0 to 1{ratio}": summary.handoff_gap_ms,
    }
    return [[*_names(result), name, *_cells(values)] for name, values in times.items() if values is not None]


def _cells(values: Distribution) -> list[object]:
    return [values.mean, values.p50, values.p90, values.p99, values.max]


def _phase_cells(result: LoadResult) -> list[object]:
    means = result.summary.phase_means_ms
    return [*(means[name] for name in PHASES), 100 * means["prefilled_on_decode_worker"]]
