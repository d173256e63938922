"""Goodput of clusters under several objectives, from the same measured requests."""

import re

import pytest

from benchmarks.load import LoadRun
from benchmarks.measurement import Measurement, Objective, RequestRecord
from benchmarks.report import Report
from benchmarks.serve_comparison import compare_results
from benchmarks.serve_load import LoadOptions, LoadResult, results_of
from benchmarks.serve_tables import show_goodputs
from benchmarks.workload import parse_workload

OBJECTIVES = tuple(Objective(itl_ms=itl_ms) for itl_ms in (20.0, 50.0, 10.0))


def results(cluster: str, round_number: int, gaps_ms: list[float], rate: float = 1.0) -> list[LoadResult]:
    """A load of requests that have gaps of one length each."""
    options = LoadOptions(parse_workload("8->4"), len(gaps_ms), 1, (rate,), None, OBJECTIVES, 0)
    measured = (Measurement(0.1, (gap / 1000,) * 3, 0.2 + 3 * gap / 1000) for gap in gaps_ms)
    records = tuple(RequestRecord("8->4", 8, 0.0, each, None) for each in measured)
    return results_of(LoadRun(records, 10.0), options, cluster, round_number, f"{rate:g} requests/s", rate)


def test_goodput_is_counted_under_each_objective_and_summarized_under_the_first() -> None:
    (result,) = results("a", 1, [15, 15, 40, 70], rate=2.0)
    assert result.goodputs_requests_per_s == (1.0, 1.5, 0.0)
    assert result.summary.goodput_requests_per_s == 1.0
    assert result.summary.good_share == 0.5


def test_goodput_is_shown_under_each_of_several_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    show_goodputs(Report("serve", None, None), results("a", 1, [15, 40]), OBJECTIVES[:1])
    assert capsys.readouterr().out == ""
    show_goodputs(Report("serve", None, None), results("a", 1, [15, 40]), OBJECTIVES)
    shown = capsys.readouterr().out
    for objective, goodput in (("ITL 20", "0.500"), ("ITL 50", "1.000"), ("ITL 10", "0.000")):
        assert re.search(rf"{objective}\b.*{goodput}", shown), shown


def test_under_each_objective_the_best_of_the_others_is_compared_with() -> None:
    of_clusters = {
        "disaggregated": results("disaggregated", 1, [15, 15]) + results("disaggregated", 2, [15, 60]),
        "small chunk": results("small chunk", 1, [15, 60]) + results("small chunk", 2, [15, 60]),
        "large chunk": results("large chunk", 1, [40, 40]) + results("large chunk", 2, [40, 40]),
    }
    strict, loose, none = compare_results("disaggregated", of_clusters, OBJECTIVES)
    assert (strict.objective, strict.colocated, strict.disaggregated_goodput, strict.ratio) == (
        OBJECTIVES[0],
        "small chunk",
        0.75,
        1.5,
    )
    assert (loose.colocated, loose.ratio) == ("large chunk", 0.75)
    assert (none.disaggregated_goodput, none.colocated_goodput, none.ratio) == (0.0, 0.0, None)


def test_of_several_loads_the_highest_counts() -> None:
    both_rates = results("a", 1, [15, 60], rate=1.0) + results("a", 1, [15, 60], rate=3.0)
    (comparison, *_) = compare_results("a", {"a": both_rates, "b": results("b", 1, [15, 15])}, OBJECTIVES)
    assert (comparison.disaggregated_goodput, comparison.colocated_goodput) == (1.5, 1.0)
