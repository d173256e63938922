"""`kvrelay bench load-memory`: what a worker's process holds while it loads a model, beside the
bytes of the weights that it serves then.

Each load is a process of its own. A small model of the same architecture is loaded first, so that
libraries do not count.
"""

import json as json_format
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.load_memory_process import LoadMemory
from benchmarks.random_models import SHAPES, save_random_model, save_small_model
from benchmarks.report import Json, Plots, Report
from kvrelay.own_packages import own_module_command

SERVED = {"float32": ("float32", "none"), "int8": ("float32", "int8"), "bfloat16": ("bfloat16", "none")}
"""--dtype and --quantize of a worker."""
MIB = 1024 * 1024
PATIENCE_S = 1800
METHOD = (
    "A worker's process, above what it held with a small model of the same architecture. Weights are random, "
    "but for models in a folder. Peak: the kernel's high-water mark of memory, pages of mapped files included."
)


def command(
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", help=f"Random models: {', '.join(SHAPES)}. Default: all, without --model."),
    ] = None,
    models: Annotated[list[Path] | None, typer.Option("--model", help="Folders of further models.")] = None,
    stored: Annotated[str, typer.Option(help="Type in which random weights are stored.")] = "bfloat16",
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Peak memory of loading in float32, int8 and bfloat16."""
    output = Report("load-memory", json, plots)
    output.note(METHOD)
    rows: list[Sequence[object]] = []
    for shape in shapes or (() if models else SHAPES):
        with tempfile.TemporaryDirectory() as folder:
            output.progress(f"making {shape}")
            rows += _measure_all(output, shape, save_random_model(Path(folder), shape, stored))
    for model in models or ():
        rows += _measure_all(output, model.name, model)
    output.print_table(
        "Memory of loading, MiB",
        ["model", "stored", "served in", "weights", "peak", "peak ÷ weights", "held when loaded"],
        rows,
        num_text_columns=3,
    )
    output.finish()


def _measure_all(output: Report, name: str, folder: Path) -> list[Sequence[object]]:
    stored_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows: list[Sequence[object]] = []
    with tempfile.TemporaryDirectory() as small:
        first = save_small_model(Path(small), folder)
        for served, (dtype, quantize) in SERVED.items():
            output.progress(f"{name} in {served}")
            (measured,) = measure_loads(first, (folder, dtype, quantize))
            output.add({"model": name, "stored_bytes": stored_bytes, "served": served, "load": measured})
            ratio = f"{measured.peak_bytes / measured.weight_bytes:.2f}"
            sizes = (measured.weight_bytes // MIB, measured.peak_bytes // MIB, ratio, measured.held_bytes // MIB)
            rows.append([name, f"{stored_bytes // MIB:,}", served, *sizes])
    return rows


def measure_loads(first: Path, *cases: tuple[Path, str, str]) -> list[LoadMemory]:
    """Of folder, dtype and quantize, in one process. Raises subprocess.SubprocessError."""
    arguments = [str(first), *(str(part) for case in cases for part in case)]
    made = subprocess.run(
        own_module_command("benchmarks.load_memory_process", *arguments),
        stdout=subprocess.PIPE,
        timeout=PATIENCE_S,
        check=True,
        encoding="utf-8",
    )
    lines = [line for line in made.stdout.splitlines() if line.startswith("{")]
    return [LoadMemory(**json_format.loads(line)) for line in lines]
