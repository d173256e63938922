"""`kvrelay bench tls`: what TLS between all services costs, and keys of clients.

Everything is there twice, in plain text and encrypted: workers and gateways with a certificate for
each role, clients with a key. Both take turns in every round of one run.

    push      KV from a prefill worker to a decode worker, over gRPC
    relay     a gateway between simulated workers and clients: CPU time of its process for a token
    service   a whole cluster: tokens/s of one stream and of 16 at once
"""

import asyncio
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.bench_credentials import BenchCredentials
from benchmarks.report import Report
from benchmarks.statistics import spread
from benchmarks.tls_measurement import (
    ENCRYPTED,
    PLAIN,
    Comparison,
    RelayWork,
    ServiceWork,
    Side,
    all_cores,
    compare,
    push,
    relay,
    service,
)
from benchmarks.transfer import LAYOUTS
from kvrelay.config.settings import EngineSettings
from kvrelay.models.store import DEMO_MODEL, ModelStore, default_model_dir
from kvrelay.observability.logging import configure_logging

PARTS = ("push", "relay", "service")
PUSH_TOKENS = 2048

Begin = Callable[[BenchCredentials | None], AbstractAsyncContextManager[Side]]


def command(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, after one that is not.")] = 5,
    parts: Annotated[str, typer.Option(help=f"With commas: {', '.join(PARTS)}.")] = ",".join(PARTS),
    model: Annotated[
        str, typer.Option(help="Of the service: a name in the model store, a folder, a GGUF file or a hub name.")
    ] = DEMO_MODEL,
    int8: Annotated[
        bool, typer.Option("--int8/--float32", help="Weights of the service; the faster ones show more of TLS.")
    ] = True,
    streams: Annotated[int, typer.Option(min=1, help="Of the relay.")] = 64,
    tokens_per_s: Annotated[float, typer.Option(min=1.0, help="Over all streams of the relay.")] = 1500.0,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of the relay, in each round.")] = 3.0,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """What TLS between all services costs, and keys."""
    output = Report("tls", json, plots)
    configure_logging("warning", "console")  # of the simulated workers, which live in this process
    store = ModelStore(default_model_dir(os.environ))
    demo = Path(store.ensure_demo_model())
    folder = str(demo) if model == DEMO_MODEL else str(store.resolve(model))
    wanted = _wanted(parts)
    with TemporaryDirectory(prefix="kvrelay-bench-") as temporary:
        # Clusters lend cores to their own workers only.
        sharing_file = str(Path(temporary) / "cores-{}")
        cores = all_cores()
        begins: dict[str, Begin] = {
            "push": lambda credentials: push(LAYOUTS["smollm2-135m"], PUSH_TOKENS, credentials),
            "relay": lambda credentials: relay(RelayWork(demo, streams, tokens_per_s, seconds), credentials, cores),
            "service": lambda credentials: service(
                ServiceWork(
                    EngineSettings(
                        model=folder,
                        quantize="int8" if int8 else "none",
                        core_sharing_file=sharing_file.format(PLAIN if credentials is None else ENCRYPTED),
                    )
                ),
                credentials,
            ),
        }
        credentials = BenchCredentials.made_in(Path(temporary) / "certificates")
        results = asyncio.run(_run({part: begins[part] for part in wanted}, credentials, rounds, output))
    output.add(*results)
    _print(output, results)
    output.finish()


async def _run(
    begins: dict[str, Begin], credentials: BenchCredentials, rounds: int, output: Report
) -> list[Comparison]:
    results: list[Comparison] = []
    for part, begin in begins.items():
        output.progress(f"{part}: starting both sides")
        async with AsyncExitStack() as stack:
            sides = {
                PLAIN: await stack.enter_async_context(begin(None)),
                ENCRYPTED: await stack.enter_async_context(begin(credentials)),
            }
            results += await compare(sides, rounds, functools.partial(_tell, output, part, rounds))
    return results


def _tell(output: Report, part: str, rounds: int, number: int) -> None:
    output.progress(f"{part}: round {number} of {rounds}")


def _wanted(text: str) -> list[str]:
    wanted = [part.strip() for part in text.split(",")]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is no part; the parts are {', '.join(PARTS)}")
    return wanted


def _print(output: Report, results: Sequence[Comparison]) -> None:
    rows: list[list[object]] = []
    for each in results:
        measure = each.measure
        goal = {True: "met", False: "missed", None: ""}[each.is_kept]
        bound = f"≥ {measure.least_ratio:g}: " if measure.least_ratio else f"≤ {measure.most_ratio:g}: " if goal else ""
        rows.append(
            [
                f"{measure.name}, {measure.unit}".removesuffix(", "),
                spread(each.plain).text(measure.decimals),
                spread(each.encrypted).text(measure.decimals),
                each.ratio.text(3),
                bound + goal,
            ]
        )
    output.note("Medians, least and most of the rounds. A ratio is of the two sides of one round.")
    output.print_table("TLS between all services, and keys", ["", "plain", "TLS", "TLS ÷ plain", "goal"], rows)
