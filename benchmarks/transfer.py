"""`kvrelay bench transfer`: how fast KV travels between two workers of one host, what it costs, and
how much of it is waited for.

Two processes with the workers' own sender and receiver over real pools, random KV, no model. Two
modes:

    raw     all layers are there at once: what the wire can do
    paced   layers are announced as a prompt's pass would, by a thread that computes: what of the transfer a request waits for

Transports and sizes take turns in every round, so that whatever else the machine does hits them
alike.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from benchmarks.copy_bandwidth import copy_gb_per_s
from benchmarks.report import Json, Plots, Report
from benchmarks.statistics import Spread, spread
from benchmarks.transfer_pair import Pass, Transfer, TransferPair
from kvrelay.core.model_spec import KVLayout

LAYOUTS = {
    "smollm2-135m": KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32"),
    "32x8x128": KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="float32"),
}
TRANSPORTS = ("grpc", "shared-memory")
NUM_COPIES = {"grpc": 6, "shared-memory": 2}
"""How often a KV byte is copied. Shared memory: into the region and out of it. gRPC: into the
message, into gRPC's memory, into the system, and the same way back."""
NUM_PROCESSES = 2
BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured together."""

    mode: str
    layout: str
    transport: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """A case over all rounds."""

    case: Case
    kv_bytes: int
    gb_per_s: Spread
    """Over the time in which a chunk was under way."""
    end_to_end_gb_per_s: Spread
    """From the begin of the push until the receiver's engine may run the sequence; the pass itself
    is in it when paced.
    """
    cpu_s_per_gb: Spread
    """Both processes."""
    exposed_ms: Spread
    handoff_ms: Spread
    ttft_s: Spread
    exposed_share: Spread
    """Exposed time over TTFT."""

    @classmethod
    def of(cls, case: Case, transfers: Sequence[Transfer]) -> "Result":
        return cls(
            case=case,
            kv_bytes=transfers[0].kv_bytes,
            gb_per_s=spread([each.kv_bytes / BYTES_PER_GB / each.wire_s for each in transfers]),
            end_to_end_gb_per_s=spread([each.kv_bytes / BYTES_PER_GB / each.total_s for each in transfers]),
            cpu_s_per_gb=spread([each.cpu_s / each.kv_bytes * BYTES_PER_GB for each in transfers]),
            exposed_ms=spread([each.exposed_s * 1000 for each in transfers]),
            handoff_ms=spread([each.handoff_s * 1000 for each in transfers]),
            ttft_s=spread([each.ttft_s for each in transfers]),
            exposed_share=spread([each.exposed_s / each.ttft_s for each in transfers]),
        )


@dataclass(frozen=True, slots=True)
class Bound:
    """What a transport could do if its copies were all that it does, one thread in each process,
    each copy through memory.
    """

    bound_of: str
    num_copies: int
    copy_gb_per_s: float
    """Of both threads together, measured in this run."""
    gb_per_s: float


def _bounds(transports: Sequence[str]) -> list[Bound]:
    rate = copy_gb_per_s(NUM_PROCESSES)
    return [Bound(name, NUM_COPIES[name], rate, rate / NUM_COPIES[name]) for name in transports]


def command(
    tokens: Annotated[str, typer.Option("--tokens", help="Prompt lengths, with commas.")] = "64,512,2048",
    layouts: Annotated[str, typer.Option("--layouts", help=f"With commas: {', '.join(LAYOUTS)}.")] = ",".join(LAYOUTS),
    transports: Annotated[str, typer.Option("--transports", help="With commas: grpc, shared-memory.")] = ",".join(
        TRANSPORTS
    ),
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds, after one that is not.")] = 7,
    prefill_tokens_per_s: Annotated[
        float, typer.Option("--prefill-tokens-per-s", help="Pace of the imitated pass.")
    ] = 500.0,
    chunk_tokens: Annotated[
        int, typer.Option("--chunk-tokens", min=1, help="Prompt tokens of one imitated step.")
    ] = 256,
    paced: Annotated[bool, typer.Option("--paced/--no-paced", help="Measure the exposed share too.")] = True,
    message_kib: Annotated[
        int | None, typer.Option("--message-kib", help="Instead of the default transfer_message_kib.")
    ] = None,
    window_mib: Annotated[
        int | None, typer.Option("--window-mib", help="Instead of the default transfer_window_mib.")
    ] = None,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Measures KV transfers between two processes: GB/s, CPU seconds per GB, and the exposed share,
    by transport and size.
    """
    output = Report("transfer", json, plots)
    changed = {"transfer_message_kib": message_kib, "transfer_window_mib": window_mib}
    settings = {name: value for name, value in changed.items() if value is not None}
    num_tokens = sorted(int(text) for text in tokens.split(","))
    pace = Pass(prefill_tokens_per_s, chunk_tokens)
    results: list[Result] = []
    for layout in layouts.split(","):
        results += _measure(
            layout, transports.split(","), num_tokens, settings, rounds, pace if paced else None, output
        )
    output.progress("copying memory")
    bounds = _bounds(transports.split(","))
    output.add(*results, *bounds)
    _print(output, results, bounds)
    _plot(output, results)
    output.finish()


def _measure(
    layout: str,
    transports: Sequence[str],
    num_tokens: Sequence[int],
    settings: dict[str, Any],
    rounds: int,
    pace: Pass | None,
    output: Report,
) -> list[Result]:
    transfers: dict[Case, list[Transfer]] = {}
    with ExitStack() as stack:
        pairs = {
            name: stack.enter_context(
                TransferPair(LAYOUTS[layout], num_tokens[-1], settings | {"transfer_transport": name})
            )
            for name in transports
        }
        for number in range(rounds + 1):
            output.progress(f"{layout}: round {number} of {rounds}")
            for case, paced in _cases(layout, transports, num_tokens, pace):
                transfer = pairs[case.transport].transfer(case.num_tokens, paced)
                if number > 0:  # the first one connects, maps and touches memory
                    transfers.setdefault(case, []).append(transfer)
        for pair in pairs.values():
            pair.check(num_tokens[-1])
    return [Result.of(case, each) for case, each in transfers.items()]


def _cases(
    layout: str, transports: Sequence[str], num_tokens: Sequence[int], pace: Pass | None
) -> Iterable[tuple[Case, Pass | None]]:
    for mode, paced in (("raw", None), ("paced", pace)):
        if mode == "raw" or paced is not None:
            for count in num_tokens:
                for transport in transports:
                    yield Case(mode, layout, transport, count), paced


def _print(output: Report, results: Sequence[Result], bounds: Sequence[Bound]) -> None:
    raw: list[list[object]] = [
        [
            each.case.layout,
            each.case.transport,
            each.case.num_tokens,
            each.kv_bytes / 1e6,
            each.gb_per_s.text(2),
            each.end_to_end_gb_per_s.text(2),
            each.cpu_s_per_gb.text(2),
        ]
        for each in results
        if each.case.mode == "raw"
    ]
    raw += [
        ["copies alone", f"{each.bound_of}, {each.num_copies} copies", "", "", f"{each.gb_per_s:.2f}", "", ""]
        for each in bounds
    ]
    columns = ["layout", "transport", "tokens", "MB", "GB/s on the wire", "GB/s with begin and end", "CPU s per GB"]
    output.print_table("Transfer, all layers at once", columns, raw, num_text_columns=2)
    paced = [
        [
            each.case.layout,
            each.case.transport,
            each.case.num_tokens,
            each.ttft_s.median,
            each.exposed_ms.text(1),
            each.exposed_share.text(2, 100),
            each.handoff_ms.text(1),
        ]
        for each in results
        if each.case.mode == "paced"
    ]
    if paced:
        columns = [
            "layout",
            "transport",
            "tokens",
            "TTFT s",
            "exposed ms",
            "exposed % of TTFT",
            "token 0 to runnable, ms",
        ]
        output.print_table("Transfer alongside a pass", columns, paced, num_text_columns=2)


def _plot(output: Report, results: Sequence[Result]) -> None:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for each in results:
        if each.case.mode == "raw":
            xs, ys = series.setdefault(f"{each.case.transport}, {each.case.layout}", ([], []))
            xs.append(each.kv_bytes / 1e6)
            ys.append(each.gb_per_s.median)
    output.plot_lines("transfer", "KV transfer between two processes of one host", "MB", "GB/s", series, log_x=True)
