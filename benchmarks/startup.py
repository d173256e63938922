"""`kvrelay bench startup`: from running `kvrelay serve all` to its first token at a client, and
what its processes hold then.

The first start of a run also warms the page cache and is shown like the others: give `--rounds` 2
or more to see both.
"""

import asyncio
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.report import Report
from benchmarks.startup_measurement import Start, is_worker, measure_start
from benchmarks.statistics import spread
from kvrelay.config.settings import BYTES_PER_MIB
from kvrelay.models.store import DEMO_MODEL, ModelStore, default_model_dir

PROMPT = "The quick brown fox jumps over"


def command(
    rounds: Annotated[int, typer.Option(min=1, help="How often the cluster is started.")] = 3,
    model: Annotated[
        str, typer.Option(help="Model: a name in the model store, a folder, a GGUF file or a hub name.")
    ] = DEMO_MODEL,
    serve_options: Annotated[str, typer.Option(help="Further options of `serve all`, as one text.")] = "",
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """Time from `serve all` to its first token, and its workers' memory."""
    output = Report("startup", json, plots)
    store = ModelStore(default_model_dir(os.environ))
    folder = store.ensure_demo_model() if model == DEMO_MODEL else store.resolve(model)
    weight_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    starts = []
    for number in range(rounds):
        output.progress(f"start {number + 1} of {rounds}")
        start = asyncio.run(measure_start(["--model", str(folder), *shlex.split(serve_options)], PROMPT))
        output.add({"round": number, "bound_bytes": start.worker_bound_bytes(weight_bytes), "start": start})
        starts.append(start)
    _show(output, starts, weight_bytes)
    output.finish()


def _show(output: Report, starts: list[Start], weight_bytes: int) -> None:
    first_token, ready = spread([start.first_token_s for start in starts]), spread([start.ready_s for start in starts])
    output.print_table(
        "From running `kvrelay serve all`, in seconds: median (min to max)",
        ["starts", "first token", "`serve all` says ready"],
        [[str(len(starts)), first_token.text(2), ready.text(2)]],
    )
    last = starts[-1]
    steps = sorted([(use.started_s, use.process, "started") for use in last.processes] + _steps(last))
    output.print_table(
        "Time line of the last start",
        ["process", "event", "s"],
        [[process, event, f"{at_s:.2f}"] for at_s, process, event in steps],
        2,
    )
    bound_mib = last.worker_bound_bytes(weight_bytes) / BYTES_PER_MIB
    rows: list[list[object]] = []
    for number, use in enumerate(last.processes):
        cpu_s = spread([start.processes[number].cpu_s for start in starts])
        row: list[object] = [
            use.process,
            cpu_s.text(2),
            use.rss_bytes / BYTES_PER_MIB,
            use.peak_rss_bytes / BYTES_PER_MIB,
        ]
        if is_worker(use):
            full_mib = last.full_bytes(use) / BYTES_PER_MIB
            row += [full_mib, bound_mib, f"{full_mib / bound_mib:.2f}"]
        else:
            row += [None, None, None]
        rows.append(row)
    output.print_table(
        "Processes when the first token was there",
        ["process", "CPU s", "RSS MiB", "peak MiB", "at most MiB", "bound MiB", "at most / bound"],
        rows,
    )
    output.note(
        "Bound of a worker: 1.3 × weights + KV pool + 500 MB. At most: the peak, or RSS and all of the pool, "
        "whose pages count"
        " only once they are written to."
    )


def _steps(start: Start) -> list[tuple[float, str, str]]:
    return [(event.at_s, event.process, event.event) for event in start.events] + [
        (start.first_token_s, "client", "first token")
    ]
