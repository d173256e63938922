"""`kvrelay bench relay`: how many tokens one gateway process relays, at what cost, and how much later they arrive for it.

For each number of streams: a flood, as fast as the gateway reads; the highest paced rate that it keeps up with, searched
downwards from there; and half of that, for the latency that the gateway adds. Workers are simulated, and share the cores with
the gateway and the clients: tokens per second of the gateway's own processor time say what it would do with a core of its own.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.relay_measurement import RelayBench, RelayLoad, RelayResult
from benchmarks.report import Report
from kvrelay.model_store import ModelStore, default_model_dir
from kvrelay.telemetry import configure_logging

FLOOD_TOKENS_PER_S = 4000
"""The flood is as long as this would take for a paced load's time."""
SEARCH_FACTOR = 0.8
MAX_SEARCHES = 8
MIN_KEPT_SHARE = 0.97
MAX_LAG_MS = 250.0
MAX_TOKENS_PER_MESSAGE = 1.1
"""Of a rate that counts as relayed in single-token messages."""

COLUMNS = [
    "load",
    "streams",
    "coalesce ms",
    "offered tok/s",
    "tok/s",
    "tok per message",
    "gateway µs/tok",
    "tok per gateway CPU s",
    "gateway cores",
    "client µs/tok",
    "added ms p50",
    "p99",
    "max",
]


def command(
    streams: Annotated[str, typer.Option(help="Numbers of streams, separated by commas.")] = "1,64,256",
    coalesce_ms: Annotated[str, typer.Option(help="For how long tokens may be gathered: several, separated by commas.")] = "0,50",
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each paced load.")] = 4.0,
    workers: Annotated[int, typer.Option(min=1, help="Simulated workers among which the streams are spread.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Processes of clients.")] = 1,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """Tokens per second through one gateway, with a simulated engine."""
    output = Report("relay", json, plots)
    configure_logging("warning", "console")  # of the simulated workers, which live in this process
    asyncio.run(_run(output, _numbers(streams), _numbers(coalesce_ms), seconds, workers, clients))
    output.finish()


async def _run(
    output: Report, streams: list[int], coalesce_ms: list[int], seconds: float, num_workers: int, num_clients: int
) -> None:
    folder = Path(ModelStore(default_model_dir(os.environ)).ensure_demo_model())
    rows = []
    async with RelayBench.running(folder, num_workers=num_workers, num_clients=num_clients) as bench:
        await bench.measure(RelayLoad(8, 400.0, 400))  # not counted: imports and connections
        for milliseconds in coalesce_ms:
            for num_streams in streams:
                async for name, result in _loads(output, bench, num_streams, milliseconds, seconds):
                    output.add({"load": name, "result": result})
                    rows.append(_row(name, result))
    output.note(
        "tok/s are those of gateway, workers and clients on the same cores; tok per gateway CPU s are those of a gateway with a"
        " core of its own. Added: from the worker's sending a step to the client's receipt of each token."
    )
    output.print_table(f"One gateway process, {num_workers} simulated workers, {num_clients} processes of clients", COLUMNS, rows)


async def _loads(
    output: Report, bench: RelayBench, num_streams: int, coalesce_ms: int, seconds: float
) -> AsyncIterator[tuple[str, RelayResult]]:
    """Flood, highest rate that is kept up with, and half of it."""
    output.progress(f"{num_streams} streams, coalescing {coalesce_ms} ms")
    flood = await bench.measure(RelayLoad(num_streams, None, int(FLOOD_TOKENS_PER_S * seconds), coalesce_ms))
    yield "flood", flood
    rate = flood.tokens_per_s
    for _ in range(MAX_SEARCHES):
        paced = await bench.measure(RelayLoad(num_streams, rate, int(rate * seconds), coalesce_ms))
        if _is_kept_up_with(paced):
            yield "highest", paced
            break
        rate *= SEARCH_FACTOR
    half = await bench.measure(RelayLoad(num_streams, rate / 2, int(rate / 2 * seconds), coalesce_ms))
    yield "half", half


def _is_kept_up_with(result: RelayResult) -> bool:
    assert result.offered_tokens_per_s is not None, "a paced load"
    if result.coalesce_ms == 0 and result.tokens_per_message > MAX_TOKENS_PER_MESSAGE:
        return False
    share = result.tokens_per_s / result.offered_tokens_per_s
    return share >= MIN_KEPT_SHARE and result.last_latency_ms <= MAX_LAG_MS + result.coalesce_ms


def _row(name: str, result: RelayResult) -> list[object]:
    offered = result.offered_tokens_per_s
    return [
        name,
        result.num_streams,
        result.coalesce_ms,
        None if offered is None else round(offered),
        round(result.tokens_per_s),
        round(result.tokens_per_message, 2),
        round(result.gateway_cpu_s_per_1000_tokens * 1000),
        round(result.tokens_per_gateway_cpu_s),
        f"{result.gateway_cores:.2f}",
        round(result.client_cpu_s_per_1000_tokens * 1000),
        result.latency_ms_p50,
        result.latency_ms_p99,
        result.latency_ms_max,
    ]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers separated by commas") from None
