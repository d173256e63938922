"""`kvrelay bench memory`: KV bytes predicted and measured, and what buffers and blocks waste on a
trace of requests.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine_steps import usable_cores
from benchmarks.kv_bytes import KVBytes, measure_kv_bytes
from benchmarks.kv_waste import (
    TracedRequest,
    Usage,
    block_manager_usage,
    doubling,
    make_trace,
    maximum_size,
    paged,
    simulate,
    used_tokens,
    waste_share,
)
from benchmarks.random_models import save_tiny_llama
from benchmarks.report import Json, Plots, Report
from kvrelay.core.model_spec import KVLayout
from kvrelay.models.store import DEMO_MODEL

TYPES = (("bfloat16", "auto"), ("float32", "auto"), ("float32", "int8"))
"""Of weights and of KV."""
TINY_KINDS = {"tiny MHA": (8, 8), "tiny GQA": (8, 2), "tiny MQA": (8, 1)}
"""Heads and KV heads of random models."""
BLOCK_SIZES = (8, 16, 32, 64, 256)
PLOTTED = ("paged, blocks of 16", "paged, blocks of 256")
TRACE_LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
"""SmolLM2-135M's, for showing tokens as bytes."""
MIB = 1024 * 1024

FORMULAS = (
    "m prompt tokens, n new ones, b sequences, l layers, h hidden size. MHA in 16 bit: 4·b·l·h·(m+n) (Sheng et "
    "al. 2023)."
    " In general: 2·bytes·b·l·kv_heads·head_dim·(m+n); in int8 a head's scale is 4 bytes more. The last new token has"
    " no KV unless generation goes on, so what is measured is that of m+n-1 tokens. transformers' cache has the "
    "weights' type."
)
PUBLISHED = (
    "Published (Kwon et al. 2023, figure 2): of the KV memory of earlier servers 20.4 % to 38.2 % held KV, "
    "of vLLM's 96.3 %."
)
TRACE = (
    "The trace: {requests} requests, prompts and outputs log-normal, together up to {most} tokens; bytes are those of"
    " SmolLM2-135M in float32."
)
CHECKED = (
    "Our block manager went through the same trace and held in every step exactly the predicted blocks, "
    "for every block size."
)


@dataclass(frozen=True, slots=True)
class Waste:
    """One strategy over the whole trace."""

    strategy: str
    peak_bytes: int
    mean_bytes: float
    waste_percent: float
    """Share of what was set aside that held nothing, over all steps."""
    copied_bytes: int
    """Moved to make room."""


def command(
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests of the trace.")] = 400,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=32, help="Longest sequence, and the maximum-size buffer.")
    ] = 2048,
    steps_between: Annotated[
        float, typer.Option("--steps-between", min=0.01, help="Mean steps between arrivals.")
    ] = 10.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the trace.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and a short trace only.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """KV bytes by formula against those measured; waste of maximum-size buffers, doubling buffers
    and paged blocks.
    """
    report = Report("memory", json, plots)
    _show_bytes(report, list(_measure_bytes(report, quick, threads or usable_cores())))
    num_requests = min(requests, 50) if quick else requests
    trace = make_trace(num_requests, max_tokens, steps_between, seed)
    _show_waste(report, trace, max_tokens)
    report.note(TRACE.format(requests=num_requests, most=max_tokens))
    report.note(PUBLISHED)
    report.finish()


@contextmanager
def _tiny_models() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="kvrelay-tiny-") as root:
        folders = {name: Path(root) / name.replace(" ", "-") for name in TINY_KINDS}
        yield {name: str(save_tiny_llama(folder, *TINY_KINDS[name])) for name, folder in folders.items()}


def _measure_bytes(report: Report, quick: bool, num_threads: int) -> Iterator[KVBytes]:
    with _tiny_models() as folders:
        for name, folder in folders.items():
            for dtype, kv_dtype in TYPES:
                report.progress(f"{name} in {dtype}, KV {kv_dtype}")
                yield measure_kv_bytes(name, folder, dtype, 3, 50, 10, num_threads, kv_dtype)
    if not quick:
        for dtype, kv_dtype in TYPES:
            report.progress(f"{DEMO_MODEL} in {dtype}, KV {kv_dtype}")
            yield measure_kv_bytes(DEMO_MODEL, DEMO_MODEL, dtype, 2, 200, 20, num_threads, kv_dtype)


def _show_bytes(report: Report, measured: Sequence[KVBytes]) -> None:
    report.add(*({"kind": "bytes"} | asdict(each) for each in measured))
    report.print_table(
        "KV bytes, predicted and measured",
        (
            "model",
            "attention",
            "KV type",
            "b x (m+n)",
            "4blh(m+n)",
            "general (m+n)",
            "general (m+n-1)",
            "export_kv",
            "DynamicCache",
            "in blocks",
        ),
        [_bytes_row(each) for each in measured],
        num_text_columns=4,
    )
    report.note(FORMULAS)


def _bytes_row(each: KVBytes) -> list[object]:
    return [
        each.model,
        f"{each.attention} {each.num_heads}/{each.num_kv_heads}",
        each.kv_dtype,
        f"{each.batch_size} x ({each.num_prompt_tokens}+{each.num_new_tokens})",
        each.mha_formula,
        each.general_formula,
        each.general_formula_computed,
        each.exported,
        each.transformers,
        each.blocks,
    ]


def _show_waste(report: Report, trace: Sequence[TracedRequest], max_tokens: int) -> None:
    used = used_tokens(trace)
    usages = [
        simulate(trace, strategy) for strategy in (maximum_size(max_tokens), doubling(), *map(paged, BLOCK_SIZES))
    ]
    held = {paged(size).name: tuple(block_manager_usage(trace, size)) for size in BLOCK_SIZES}
    is_as_predicted = all(usage.reserved_tokens == held.get(usage.strategy, usage.reserved_tokens) for usage in usages)
    wastes = [_waste(usage, used) for usage in usages]
    report.add(*({"kind": "waste"} | asdict(waste) for waste in wastes))
    report.add({"kind": "block_manager_holds_what_is_predicted", "value": is_as_predicted})
    report.print_table(
        f"Memory set aside for {len(trace)} requests, {sum(used) / len(used):,.0f} tokens at once on average",
        (
            "strategy",
            "peak MiB",
            "mean MiB",
            "holds nothing %",
            "copied MiB",
            "sequences in the same memory, times maximum size",
        ),
        [
            [
                waste.strategy,
                waste.peak_bytes / MIB,
                waste.mean_bytes / MIB,
                waste.waste_percent,
                waste.copied_bytes / MIB,
                wastes[0].mean_bytes / waste.mean_bytes,
            ]
            for waste in wastes
        ],
    )
    if is_as_predicted:
        report.note(CHECKED)
    _plot(report, used, usages)


def _waste(usage: Usage, used: Sequence[int]) -> Waste:
    bytes_per_token = TRACE_LAYOUT.bytes_per_token
    return Waste(
        strategy=usage.strategy,
        peak_bytes=max(usage.reserved_tokens) * bytes_per_token,
        mean_bytes=sum(usage.reserved_tokens) / len(usage.reserved_tokens) * bytes_per_token,
        waste_percent=100 * waste_share(usage.reserved_tokens, used),
        copied_bytes=usage.num_copied_tokens * bytes_per_token,
    )


def _plot(report: Report, used: Sequence[int], usages: Sequence[Usage]) -> None:
    shown = [usage for usage in usages if not usage.strategy.startswith("paged") or usage.strategy in PLOTTED]
    lines = {usage.strategy: usage.reserved_tokens for usage in shown} | {"KV itself": tuple(used)}
    steps = [float(step) for step in range(len(used))]
    in_mib = {
        label: (steps, [tokens * TRACE_LAYOUT.bytes_per_token / MIB for tokens in values])
        for label, values in lines.items()
    }
    report.plot_lines("memory-waste", "KV memory set aside over the trace", "step", "MiB", in_mib)
