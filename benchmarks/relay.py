"""`kvrelay bench relay`: how many tokens one gateway process relays, at what cost, and how much
later they arrive for it.

For each number of streams: a flood, as fast as the gateway reads; the highest paced rate that it
keeps up with, searched downwards from there; and half of that, for the latency that the gateway
adds. The gateway has a core to itself, simulated workers and clients have the others. Without
coalescing the same loads are written once more by a server that has nothing to do but that: the
floor, below which no gateway on grpc.aio can come.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.relay_measurement import RelayBench, RelayLoad, RelayResult
from benchmarks.report import Report
from kvrelay.models.store import ModelStore, default_model_dir
from kvrelay.observability.logging import configure_logging

FLOOD_TOKENS_PER_S = 4000
"""The flood is as long as this would take for a paced load's time."""
SEARCH_FACTOR = 0.8
MAX_SEARCHES = 12
NUM_REFINEMENTS = 2
MIN_KEPT_SHARE = 0.97
NEAR_SHARE = 0.85
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
    coalesce_ms: Annotated[
        str, typer.Option(help="For how long tokens may be gathered: several, separated by commas.")
    ] = "0,50",
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each paced load.")] = 4.0,
    tokens_per_s: Annotated[
        float | None, typer.Option(min=1.0, help="This rate and half of it, instead of the highest.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Simulated workers among which the streams are spread.")] = 4,
    clients: Annotated[int, typer.Option(min=1, help="Processes of clients.")] = 1,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """Tokens per second through one gateway, with a simulated engine."""
    output = Report("relay", json, plots)
    configure_logging("warning", "console")  # of the simulated workers, which live in this process
    asyncio.run(_run(output, _numbers(streams), _numbers(coalesce_ms), seconds, tokens_per_s, workers, clients))
    output.finish()


async def _run(
    output: Report,
    streams: list[int],
    coalesce_ms: list[int],
    seconds: float,
    tokens_per_s: float | None,
    num_workers: int,
    num_clients: int,
) -> None:
    folder = Path(ModelStore(default_model_dir(os.environ)).ensure_demo_model())
    rows = []
    async with RelayBench.running(folder, num_workers=num_workers, num_clients=num_clients) as bench:
        await bench.measure(RelayLoad(8, 400.0, 400))  # not counted: imports and connections
        for milliseconds in coalesce_ms:
            for num_streams in streams:
                output.progress(f"{num_streams} streams, coalescing {milliseconds} ms")
                async for name, result in _loads(bench, num_streams, milliseconds, seconds, tokens_per_s):
                    output.add({"load": name, "result": result})
                    rows.append(_row(name, result))
    output.note(
        "The gateway has one core; workers, Valkey and clients have the others. Added: from the worker's "
        "sending a step to the"
        " client's receipt of each token. Floor: the same messages from a bare grpc.aio server on the gateway's core."
    )
    output.print_table(
        f"One gateway process, {num_workers} simulated workers, {num_clients} processes of clients", COLUMNS, rows
    )


async def _loads(
    bench: RelayBench, num_streams: int, coalesce_ms: int, seconds: float, tokens_per_s: float | None
) -> AsyncIterator[tuple[str, RelayResult]]:
    """Flood, highest rate that is kept up with or the one that is given, half of it, and the floors
    of both.
    """

    def load(rate: float) -> RelayLoad:
        return RelayLoad(num_streams, rate, int(rate * seconds), coalesce_ms)

    flood = await bench.measure(RelayLoad(num_streams, None, int(FLOOD_TOKENS_PER_S * seconds), coalesce_ms))
    yield "flood", flood
    if tokens_per_s is not None:
        highest: RelayResult | None = await bench.measure(load(tokens_per_s))
    else:
        highest = await _highest(lambda rate: bench.measure(load(rate)), flood.tokens_per_s)
    if highest is None:
        return
    yield "highest" if tokens_per_s is None else "given", highest
    assert highest.offered_tokens_per_s is not None, "a paced load"
    rates = {
        "highest" if tokens_per_s is None else "given": highest.offered_tokens_per_s,
        "half": highest.offered_tokens_per_s / 2,
    }
    yield "half", await bench.measure(load(rates["half"]))
    if coalesce_ms == 0:
        for name, rate in rates.items():
            yield f"floor of {name}", await bench.measure_floor(load(rate))


async def _highest(measure: Callable[[float], Awaitable[RelayResult]], tokens_per_s: float) -> RelayResult | None:
    """The highest rate that is kept up with: searched downwards, then between the last that was not
    and the first that was.
    """
    best = None
    for _ in range(MAX_SEARCHES):
        best = await _kept_up_with(measure, tokens_per_s)
        if best is not None:
            break
        tokens_per_s *= SEARCH_FACTOR
    factor = SEARCH_FACTOR**-0.5
    for _ in range(NUM_REFINEMENTS if best is not None else 0):
        result = await _kept_up_with(measure, tokens_per_s * factor)
        if result is not None:
            best = result
            tokens_per_s *= factor
        factor **= 0.5
    return best


async def _kept_up_with(measure: Callable[[float], Awaitable[RelayResult]], tokens_per_s: float) -> RelayResult | None:
    """The result at a rate if it is kept up with. A near miss has a second try: a shared machine
    may have stood still.
    """
    for _ in range(2):
        result = await measure(tokens_per_s)
        if _is_kept_up_with(result):
            return result
        merged = result.coalesce_ms == 0 and result.tokens_per_message > 1.5 * MAX_TOKENS_PER_MESSAGE
        if merged or result.tokens_per_s < NEAR_SHARE * tokens_per_s:
            return None
    return None


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
