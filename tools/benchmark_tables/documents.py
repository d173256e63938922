"""What a run of a benchmark wrote as JSON, and how a table of it is listed and written."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "docs/benchmarks"

Rows = Sequence[Sequence[str]]
"""Rows of a table; the first has the columns' titles."""

TABLES: dict[str, Callable[[], str]] = {}
"""Every table by its name, as Markdown."""


@dataclass(frozen=True, slots=True)
class Document:
    """What one run of a benchmark wrote."""

    name: str
    command: str
    date: str
    machine: str
    results: Sequence[dict[str, Any]]

    @property
    def source(self) -> str:
        """The line below a table."""
        return f"`{self.command}`, {self.date}, {self.machine} ([values]({self.name}.json))."


@functools.cache
def read(name: str) -> Document:
    data = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    command = data["command"].partition(" --json ")[0].replace("python -m cli bench", "kvrelay bench")
    return Document(name, command, data["date"][:10], _machine(data["machine"]), data["results"])


def table(*documents: str) -> Callable[[Callable[..., Rows]], Callable[..., Rows]]:
    """Lists a table that is made from these documents."""

    def listed(make: Callable[..., Rows]) -> Callable[..., Rows]:
        def markdown() -> str:
            sources = [read(name) for name in documents]
            return "\n\n".join([markdown_table(make(*sources)), *(each.source for each in sources)])

        TABLES[make.__name__] = markdown
        return make

    return listed


def _machine(machine: dict[str, Any]) -> str:
    vectors = (
        "AVX-512" if "avx512f" in machine["cpu_flags"] else "AVX2" if "avx2" in machine["cpu_flags"] else "no AVX2"
    )
    vectors += " and AMX" if "amx_int8" in machine["cpu_flags"] else ""
    return f"{machine['num_cores']} cores of {machine['cpu']}, {vectors}"


def markdown_table(rows: Rows) -> str:
    lines = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def verdict(value: float, goal: float, *, at_least: bool = True) -> str:
    """Whether a value keeps its goal; a goal that was missed stands out."""
    return "met" if (value >= goal if at_least else value <= goal) else "**missed**"
