"""Shows the results of a comparison: a table of figures and one of ratios per number of threads, and plots."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.peers import measures
from benchmarks.peers.results import Result, advantage, find
from benchmarks.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("decode, 1 stream, tok/s", "w1", measures.TOKENS_PER_S, 1),
    ("TTFT 32, s", "ttft-32", measures.TTFT_S, 3),
    ("TTFT 512, s", "ttft-512", measures.TTFT_S, 2),
    ("TTFT 2048, s", "ttft-2048", measures.TTFT_S, 2),
    ("16 × (128 → 64), tok/s", "w2", measures.TOKENS_PER_S, 0),
    ("16 × (128 → 64), TTFT s", "w2", measures.TTFT_S, 2),
    ("streams alone, ITL p50 ms", "w3-quiet", measures.ITL_P50_MS, 0),
    ("p99", "w3-quiet", measures.ITL_P99_MS, 0),
    ("max", "w3-quiet", measures.ITL_MAX_MS, 0),
    ("under long prompts, ITL p50 ms", "w3", measures.ITL_P50_MS, 0),
    ("p99", "w3", measures.ITL_P99_MS, 0),
    ("max", "w3", measures.ITL_MAX_MS, 0),
    ("long TTFT, s", "w3", measures.LONG_TTFT_S, 1),
    ("load, s", "load", "load_s", 0),
    ("RSS, MiB", "load", "resident_mib", 0),
)
"""Heading, run, measure, decimals."""
OURS = ("kvrelay", "kvrelay-int8", "kvrelay-service", "kvrelay-service-int8")


def print_tables(output: Report, results: Sequence[Result]) -> None:
    """A table of medians, with minimum and maximum, and one of ratios, for each number of threads."""
    for num_threads in sorted({result.num_threads for result in results}):
        here = [result for result in results if result.num_threads == num_threads]
        columns = [column for column in COLUMNS if any((each.run, each.measure) == column[1:3] for each in here)]
        _print_figures(output, here, columns, num_threads)
        for ours in OURS:
            _print_ratios(output, here, [column for column in columns if column[1] != "load"], ours, num_threads)


def draw_plots(output: Report, results: Sequence[Result]) -> None:
    """Bars of each run's main figure, for each number of threads."""
    for num_threads in sorted({result.num_threads for result in results}):
        for heading, run, measure, _ in COLUMNS:
            shown = [each for each in results if (each.num_threads, each.run, each.measure) == (num_threads, run, measure)]
            if shown and run != "load":
                output.plot(f"peers-{run}-{measure.replace('_', '-')}-{num_threads}", _bars(heading, shown))


def _print_figures(
    output: Report, here: Sequence[Result], columns: Sequence[tuple[str, str, str, int]], num_threads: int
) -> None:
    rows = []
    for name, title, version in dict.fromkeys((each.peer, each.title, each.version) for each in here):
        cells = [find(here, name, num_threads, run, measure) for _, run, measure, _ in columns]
        texts = [None if cell is None else cell.spread.text(column[3]) for cell, column in zip(cells, columns, strict=True)]
        rows.append([f"{title} ({version})", *texts])
    output.print_table(f"{num_threads} threads: median (min to max)", ["", *(column[0] for column in columns)], rows)


def _print_ratios(
    output: Report, here: Sequence[Result], columns: Sequence[tuple[str, str, str, int]], ours: str, num_threads: int
) -> None:
    names = [name for name in dict.fromkeys(each.peer for each in here) if name not in OURS]
    rows = []
    for name in names:
        texts = []
        for _, run, measure, _ in columns:
            pair = find(here, ours, num_threads, run, measure), find(here, name, num_threads, run, measure)
            texts.append(None if pair[0] is None or pair[1] is None else advantage(pair[0], pair[1]).text(2))
        if any(texts):
            rows.append([name, *texts])
    if rows:
        title = f"{num_threads} threads: {ours} is so many times faster than (above 1: ahead)"
        output.print_table(title, ["", *(column[0] for column in columns)], rows)


def _bars(heading: str, shown: Sequence[Result]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        names = [each.peer for each in shown]
        medians = [each.spread.median for each in shown]
        low = [each.spread.median - each.spread.min for each in shown]
        high = [each.spread.max - each.spread.median for each in shown]
        colours = ["tab:orange" if name in OURS else "tab:blue" for name in names]
        axes.barh(names, medians, xerr=[low, high], color=colours)
        axes.invert_yaxis()
        axes.set(title=f"{heading} ({shown[0].num_threads} threads)")
        axes.grid(visible=True, axis="x", alpha=0.3)

    return draw
