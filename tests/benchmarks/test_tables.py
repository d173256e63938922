"""Tables of benchmarks at the widths of terminals, from made-up results."""

import re
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.load import LoadRun
from benchmarks.measurement import Measurement, Objective, RequestRecord
from benchmarks.peers import result_tables
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.results import make_results
from benchmarks.report import Report
from benchmarks.serve_comparison import Comparison
from benchmarks.serve_load import LoadOptions, LoadResult, results_of
from benchmarks.serve_tables import plot_rates, show_comparisons, show_goodputs, show_results
from benchmarks.workload import parse_workload
from kvrelay.core.timeline import Phases

NO_OBJECTIVE = (Objective(),)
OBJECTIVES = (Objective(ttft_ms=10000.0, itl_ms=50.0), Objective(ttft_ms=10000.0, itl_ms=75.0))
CLUSTER = "2 prefill + 2 decode"


def load_results(objectives: tuple[Objective, ...], kinds: tuple[str, ...] = ("256->64",)) -> list[LoadResult]:
    """Requests of seconds, of one kind or several, with phases."""
    options = LoadOptions(parse_workload("256->64"), 4, 4, (), None, objectives, 0)
    times: dict[str, Any] = {
        name: 1234.56 * (1 + number) for number, name in enumerate(Phases.__slots__) if name.endswith("_ms")
    }
    records = tuple(
        RequestRecord(kind, 2048, 0.0, Measurement(12.3456, (0.0415,) * 63, 15.5), Phases(**times))
        for kind in kinds * 4
    )
    return results_of(LoadRun(records, 10.0), options, CLUSTER, 1, "streams among long prompts", None)


def show_peers(output: Report) -> None:
    runs = [column for _, columns in result_tables.TABLES for column in columns]
    values = {
        (peer.name, 2, column.run, column.measure): [1234.5, 1300.25, 1400.125] for peer in PEERS for column in runs
    }
    results = make_results(values, {peer.name: "0.3.23-gabcdef" for peer in PEERS})
    result_tables.print_tables(output, results)


def show_serve(output: Report) -> None:
    results = load_results(OBJECTIVES, ("256->64", "2048->32"))
    show_results(output, results, OBJECTIVES)
    show_goodputs(output, results, OBJECTIVES)
    show_comparisons(output, [Comparison(OBJECTIVES[0], CLUSTER, "4 colocated, chunk 512", 12.345, 1.234)])


def show_wide(output: Report) -> None:
    """A table as `bench transfer` and others print, with more columns than any of them."""
    heads = [
        "layout",
        "transport",
        "GB/s with begin and end",
        "ms: median (least to most)",
        "% outside kernels",
        "tokens",
    ]
    row = ["contiguous", "shared-memory", "12.345 (11.234 to 13.456)", "1,234.5 (1,100.1 to 1,300.3)", 99.9, 131072]
    output.print_table("Transfer, all layers at once, in each of the layouts", heads * 2, [row * 2], num_text_columns=2)


def shown(show: Callable[[Report], None], width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    console = Console(width=width)
    monkeypatch.setattr(report, "console", lambda: console)
    with console.capture() as capture:
        show(Report("serve", None, None))
    return capture.get()


def words(text: str) -> set[str]:
    return set(re.sub(r"[\u2500-\u257f]", " ", text).split())


@pytest.mark.parametrize("width", [80, 110, 160])
@pytest.mark.parametrize("show", [show_serve, show_peers, show_wide])
def test_tables_have_whole_words_and_fit_the_terminal(
    show: Callable[[Report], None], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(show, width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    assert words(text) == words(shown(show, 2000, monkeypatch)), text


def test_goodput_is_shown_only_where_an_objective_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(objectives: tuple[Objective, ...]) -> str:
        return shown(lambda output: show_results(output, load_results(objectives), objectives), 160, monkeypatch)

    assert {"good", "goodput"}.isdisjoint(words(show(NO_OBJECTIVE)))
    assert {"good", "goodput"} <= words(show(OBJECTIVES))


def test_clusters_are_compared_by_goodput_only_where_an_objective_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(objective: Objective) -> str:
        comparison = Comparison(objective, CLUSTER, "1 colocated, chunk 64", 1.5, 1.2)
        return shown(lambda output: show_comparisons(output, [comparison]), 110, monkeypatch)

    without, bounded = show(Objective()), show(OBJECTIVES[0])
    assert "1.25" in without
    assert not re.search("goodput|objective|none", without, re.IGNORECASE)
    assert all(text in bounded for text in ("TTFT 10000, ITL 50", "goodput req/s", "1.25"))


def test_curves_are_of_good_requests_only_where_an_objective_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = count(1)
    drawn = []
    monkeypatch.setattr(Report, "plot_lines", lambda self, name, *texts, **options: drawn.append((name, *texts[:3])))
    for objectives in (NO_OBJECTIVE, OBJECTIVES):
        options = LoadOptions(parse_workload("8->4"), 1, 1, (), None, objectives, 0)
        record = RequestRecord("8->4", 8, 0.0, Measurement(0.1, (0.01,), 0.2), None)
        results = [
            result
            for rate in (float(next(rates)), float(next(rates)))
            for result in results_of(LoadRun((record,), 1.0), options, "a", 0, f"{rate:g} requests/s", rate)
        ]
        plot_rates(Report("serve", None, None), results, objectives)
    assert drawn == [
        ("serve-requests", "Requests that did not fail", "offered requests/s", "served requests/s"),
        ("serve-goodput", "Goodput", "offered requests/s", "good requests/s"),
    ]


def test_the_kind_of_requests_is_shown_only_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(*kinds: str) -> str:
        return shown(
            lambda output: show_results(output, load_results(NO_OBJECTIVE, kinds), NO_OBJECTIVE), 160, monkeypatch
        )

    assert "kind" not in words(show("256->64"))
    assert {"kind", "256->64", "2048->32"} <= words(show("256->64", "2048->32"))


def test_a_table_without_rows_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(lambda output: output.print_table("Title", ["name"], []), 80, monkeypatch) == ""
