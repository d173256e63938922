"""Shows the results of a comparison: tables of figures and of ratios for each number of threads,
and plots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.peers import measures
from benchmarks.peers.results import Result, advantage, find
from benchmarks.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Column:
    """One measure as it is shown."""

    heading: str
    run: str
    measure: str
    decimals: int
    is_plotted: bool = False


SINGLE_AND_BATCH = (
    Column("1 stream tok/s", "w1", measures.TOKENS_PER_S, 1, is_plotted=True),
    Column("TTFT 32, s", "ttft-32", measures.TTFT_S, 3),
    Column("TTFT 512, s", "ttft-512", measures.TTFT_S, 2),
    Column("TTFT 2048, s", "ttft-2048", measures.TTFT_S, 2, is_plotted=True),
    Column("batch of 16 tok/s", "w2", measures.TOKENS_PER_S, 0, is_plotted=True),
    Column("batch of 16 TTFT, s", "w2", measures.TTFT_S, 2),
    Column("load s", "load", "load_s", 0),
    Column("RSS MiB", "load", "resident_mib", 0),
)
UNDER_LONG_PROMPTS = (
    Column("alone ITL p50, ms", "w3-quiet", measures.ITL_P50_MS, 0),
    Column("alone p99, ms", "w3-quiet", measures.ITL_P99_MS, 0),
    Column("alone max, ms", "w3-quiet", measures.ITL_MAX_MS, 0),
    Column("loaded ITL p50, ms", "w3", measures.ITL_P50_MS, 0),
    Column("loaded p99, ms", "w3", measures.ITL_P99_MS, 0, is_plotted=True),
    Column("loaded max, ms", "w3", measures.ITL_MAX_MS, 0, is_plotted=True),
    Column("long TTFT, s", "w3", measures.LONG_TTFT_S, 1, is_plotted=True),
)
TABLES = (
    ("one stream, and 16 at once", SINGLE_AND_BATCH),
    ("4 streams, alone and under long prompts", UNDER_LONG_PROMPTS),
)
OURS = ("kvrelay", "kvrelay-int8", "kvrelay-service", "kvrelay-service-int8")


def print_tables(output: Report, results: Sequence[Result]) -> None:
    """Medians with minimum and maximum, then ratios, for each number of threads."""
    for num_threads in sorted({result.num_threads for result in results}):
        here = [result for result in results if result.num_threads == num_threads]
        for title, columns in TABLES:
            shown = [
                column
                for column in columns
                if any((each.run, each.measure) == (column.run, column.measure) for each in here)
            ]
            if any(column.run != "load" for column in shown):
                _print_figures(output, here, shown, f"{num_threads} threads, {title}: median (min to max)")
        for ours in OURS:
            _print_ratios(output, here, ours, num_threads)


def draw_plots(output: Report, results: Sequence[Result]) -> None:
    """Bars of the main measures, for each number of threads."""
    for num_threads in sorted({result.num_threads for result in results}):
        for _, columns in TABLES:
            for column in columns:
                shown = [
                    each
                    for each in results
                    if (each.num_threads, each.run, each.measure) == (num_threads, column.run, column.measure)
                ]
                if shown and column.is_plotted:
                    output.plot(
                        f"peers-{column.run}-{column.measure.replace('_', '-')}-{num_threads}", _bars(column, shown)
                    )


def _print_figures(output: Report, here: Sequence[Result], columns: Sequence[Column], title: str) -> None:
    rows = []
    for name, weights, version in dict.fromkeys((each.peer, each.weights, each.version) for each in here):
        cells = [find(here, name, column.run, column.measure) for column in columns]
        texts = [
            "" if cell is None else cell.spread.text(column.decimals)
            for cell, column in zip(cells, columns, strict=True)
        ]
        if any(text for text, column in zip(texts, columns, strict=True) if column.run != "load"):
            rows.append([f"{name} {version.partition('-')[0]}", weights, *texts])
    output.print_table(title, ["", "weights", *(column.heading for column in columns)], rows, num_text_columns=2)


def _print_ratios(output: Report, here: Sequence[Result], ours: str, num_threads: int) -> None:
    columns = [column for _, columns in TABLES for column in columns if find(here, ours, column.run, column.measure)]
    columns = [column for column in columns if column.run != "load"]
    rows = []
    for name, weights in dict.fromkeys((each.peer, each.weights) for each in here):
        texts = [
            _ratio_text(find(here, ours, each.run, each.measure), find(here, name, each.run, each.measure))
            for each in columns
        ]
        if any(texts) and (name not in OURS or OURS.index(name) < OURS.index(ours)):
            rows.append([name, weights, *texts])
    if rows:
        title = f"{num_threads} threads: so many times better is {ours} than (above 1: ahead)"
        output.print_table(
            title,
            ["", "weights", *(column.heading.rpartition(",")[0] or column.heading for column in columns)],
            rows,
            2,
        )


def _ratio_text(ours: Result | None, theirs: Result | None) -> str:
    return "" if ours is None or theirs is None else advantage(ours, theirs).text(2)


def _bars(column: Column, shown: Sequence[Result]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        names = [each.peer for each in shown]
        medians = [each.spread.median for each in shown]
        low = [each.spread.median - each.spread.min for each in shown]
        high = [each.spread.max - each.spread.median for each in shown]
        axes.barh(
            names, medians, xerr=[low, high], color=["tab:orange" if name in OURS else "tab:blue" for name in names]
        )
        axes.invert_yaxis()
        axes.set(title=f"{column.heading} ({shown[0].num_threads} threads)")
        axes.grid(visible=True, axis="x", alpha=0.3)

    return draw
