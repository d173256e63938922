"""How every benchmark shows what it measured: tables for people, one JSON document, plots. Knows
nothing of what was measured.

The document: {"benchmark", "command", "date", "machine", "versions", "notes", "results"}.
"""

import importlib
import json as json_format
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.machine import this_machine, versions
from kvrelay.cli.views.fitted_table import FittedTable
from kvrelay.cli.views.output import console, to_json
from kvrelay.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = Annotated[Path | None, typer.Option("--json", help="Write all results into this file as one JSON document.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="Draw plots into this folder, as PNG.")]

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Curves by their label: x and y values."""

PLOT_INCHES = (8.0, 4.5)
PLOT_DOTS_PER_INCH = 120


class Report:
    """Results of one run of a benchmark.

    Args:
        benchmark: its name.
        json: file for the document; None writes none.
        plots: folder for plots; None draws none.

    Raises:
        ConfigError: a path cannot be written to.
        ModuleNotFoundError: plots are wanted and matplotlib is not installed.
    """

    def __init__(self, benchmark: str, json: Path | None, plots: Path | None) -> None:
        self._json = json
        self._plots = plots
        self._console = console()
        self._notes: list[str] = []
        self._results: list[Any] = []
        self._head = {
            "benchmark": benchmark,
            "command": command_line(sys.argv),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": this_machine(),
            "versions": versions(),
        }
        for folder in filter(None, (json and json.parent, plots)):
            _make_folder(folder)
        if plots is not None:
            importlib.import_module("matplotlib")

    def add(self, *results: Any) -> None:
        """Adds results to the document: dataclasses or mappings."""
        self._results += results

    def note(self, text: str) -> None:
        """Says something that must be known with the figures, now and in the document."""
        self._notes.append(text)
        self._console.print(text, markup=False, soft_wrap=True)

    def progress(self, text: str) -> None:
        """Says what runs now, on standard error."""
        print(text, file=sys.stderr, flush=True)

    def print_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], num_text_columns: int = 1
    ) -> None:
        """Prints a table, if it has rows. The first `num_text_columns` say what a row is about;
        others are set to the right.
        """
        if not rows:
            return
        table = FittedTable(title, num_key_columns=max(num_text_columns, 1))
        for number, column in enumerate(columns):
            table.add_text_column(column, right=number >= num_text_columns)
        for row in rows:
            table.add_texts(*(cell_text(cell) for cell in row))
        self._console.print(table)

    def plot(self, name: str, draw: Callable[["Axes"], None]) -> None:
        """Draws `<plots>/<name>.png`; nothing where no plots are wanted."""
        if self._plots is None:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # A figure of its own on Agg, without pyplot: no display is looked for and nothing global is
        # changed.
        figure = Figure(figsize=PLOT_INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        path = self._plots / f"{name}.png"
        figure.savefig(path, dpi=PLOT_DOTS_PER_INCH, metadata={"Software": None})
        self._console.print(f"plot: {path}", markup=False, soft_wrap=True)

    def plot_lines(
        self,
        name: str,
        title: str,
        x_label: str,
        y_label: str,
        series: Series,
        *,
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        """Draws curves into `<plots>/<name>.png`; nothing where no plots are wanted."""

        def draw(axes: "Axes") -> None:
            for label, (xs, ys) in series.items():
                axes.plot(xs, ys, label=label, linewidth=1.2, marker="o" if len(xs) <= 16 else None, markersize=4)
            axes.set(title=title, xlabel=x_label, ylabel=y_label)
            for axis, is_log in (("x", log_x), ("y", log_y)):
                if is_log:
                    _set_log(axes, axis)
            axes.grid(visible=True, alpha=0.3)
            # Below the curves, for it would lie upon them wherever there are many.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)

        self.plot(name, draw)

    def document(self) -> dict[str, Any]:
        """All of it as what JSON knows."""
        document: dict[str, Any] = to_json(self._head | {"notes": self._notes, "results": self._results})
        return document

    def finish(self) -> None:
        """Writes the document, where one is wanted."""
        if self._json is not None:
            self._json.write_text(json_format.dumps(self.document(), indent=1, ensure_ascii=False) + "\n", "utf-8")
            self._console.print(f"results: {self._json}", markup=False, soft_wrap=True)


def cell_text(value: object) -> str:
    """A table's cell: numbers with separators, floats with one decimal, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def command_line(arguments: Sequence[str]) -> str:
    """The command as one types it, without the folder that it lies in."""
    program = Path(arguments[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, shlex.join(arguments[1:])]).strip()


def _set_log(axes: "Axes", axis: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{axis}scale": "log"})
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ticks.set_minor_locator(NullLocator())
    ticks.set_major_formatter("{x:g}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}; name another folder") from error
