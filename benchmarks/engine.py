"""`kvrelay bench engine`: prefill and decode of our engine, beside what the machine can do at most,
measured in the same run.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from benchmarks.engine_cases import (
    Case,
    Result,
    Sample,
    case_cost,
    decode_cases,
    dtype_name,
    fill_pool,
    model_cost,
    pool_tokens,
    prefill_cases,
    product_type,
    summarize,
    time_case,
)
from benchmarks.engine_steps import EngineSteps, load_engine, usable_cores
from benchmarks.report import Json, Plots, Report
from benchmarks.roofline import LimitMeter
from benchmarks.statistics import spread
from kvrelay.models.store import DEMO_MODEL

PROMPT_LENGTHS = "32,64,128,256,512,1024,2048"
CHUNK_SIZES = "64,128,256,512,2048"
BATCH_SIZES = "1,2,4,8,16,32"
CONTEXT_LENGTHS = "64,512,2048"
QUICK_PROMPT_LENGTHS, QUICK_CHUNK_SIZES = "128,512", "256,2048"
QUICK_BATCH_SIZES, QUICK_CONTEXT_LENGTHS = "1,8,16", "512"
HOW_MEASURED = (
    "Reading: torch sums a buffer of 512 MiB. Multiplying: torch multiplies matrices of 2,048 x 2,048 of the type "
    "that the weights have. "
    "Each case is"
    " compared with what was measured right before and after it. The bound of a step is the slower of reading "
    "what it must read"
    " and of multiplying what it must multiply."
)
OUTSIDE = "Outside of kernels: share of a step's time in Python and torch, that is all but the compiled kernels."


def command(
    model: Annotated[str, typer.Option("--model", help="Model.")] = DEMO_MODEL,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", help="int8, as a worker's --quantize.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="As a worker's --dtype.")] = None,
    bfloat16_activations: Annotated[
        str | None, typer.Option("--bfloat16-activations", help="As a worker's --bfloat16-activations.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option("--kv-dtype", help="As a worker's --kv-dtype.")] = None,
    kernels: Annotated[str | None, typer.Option("--kernels", help="off: torch alone, as a worker's --kernels.")] = None,
    kernel_variant: Annotated[
        str | None, typer.Option("--kernel-variant", help="As a worker's --kernel-variant.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few lengths and batches.")] = False,
    prompt_lengths: Annotated[
        str | None, typer.Option("--prompt-lengths", help=f"Tokens of prompts. Default: {PROMPT_LENGTHS}.")
    ] = None,
    chunk_sizes: Annotated[
        str | None, typer.Option("--chunk-sizes", help=f"Prompt tokens a step. Default: {CHUNK_SIZES}.")
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", help=f"Sequences that decode. Default: {BATCH_SIZES}.")
    ] = None,
    context_lengths: Annotated[
        str | None, typer.Option("--context-lengths", help=f"Tokens that they have. Default: {CONTEXT_LENGTHS}.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Every case is measured once in each round.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps of a case in each round.")] = 16,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Prefill by length and chunk size, decode by batch and context, with the machine's limits
    measured in the same run.
    """
    prefill = _numbers("--prompt-lengths", prompt_lengths, QUICK_PROMPT_LENGTHS if quick else PROMPT_LENGTHS)
    chunks = _numbers("--chunk-sizes", chunk_sizes, QUICK_CHUNK_SIZES if quick else CHUNK_SIZES)
    batches = _numbers("--batch-sizes", batch_sizes, QUICK_BATCH_SIZES if quick else BATCH_SIZES)
    contexts = _numbers("--context-lengths", context_lengths, QUICK_CONTEXT_LENGTHS if quick else CONTEXT_LENGTHS)
    cases = [*prefill_cases(prefill, chunks), *decode_cases(batches, contexts)]
    settings = {
        "quantize": quantize,
        "dtype": dtype,
        "bfloat16_activations": bfloat16_activations,
        "kv_dtype": kv_dtype,
        "kernels": kernels,
        "kernel_variant": kernel_variant,
    }
    num_threads, report = threads or usable_cores(), Report("engine", json, plots)
    ours = load_engine(model, num_threads, pool_tokens(cases, steps), **settings)
    _measure_and_show(
        report, ours, cases, settings, LimitMeter(num_threads, product_type(ours, quantize)), rounds, steps
    )


def _measure_and_show(
    report: Report,
    ours: EngineSteps,
    cases: Sequence[Case],
    settings: Mapping[str, str | None],
    meter: LimitMeter,
    rounds: int,
    steps: int,
) -> None:
    fill_pool(ours)
    samples = _measure(report, ours, cases, meter, rounds, steps)
    quantize, kv_dtype = settings["quantize"], settings["kv_dtype"]
    cost = model_cost(ours, quantize)
    is_compiled = ours.engine.model_runner.model.decoder is not None
    results = [summarize(case, samples[case], case_cost(cost, case), is_compiled=is_compiled) for case in cases]
    kv_text = f", KV in {kv_dtype}" if kv_dtype else ""
    title = f"{ours.engine.model.name}, {quantize or dtype_name(ours)}{kv_text}, {meter.num_threads} threads"
    _show(report, title, results, meter, is_compiled)
    report.add({"num_threads": meter.num_threads, "is_compiled": is_compiled, **settings})
    report.finish()


def _measure(
    report: Report, ours: EngineSteps, cases: Sequence[Case], meter: LimitMeter, rounds: int, steps: int
) -> dict[Case, list[Sample]]:
    samples: dict[Case, list[Sample]] = defaultdict(list)
    before = meter.measure()
    for number in range(rounds):
        report.progress(f"round {number + 1} of {rounds}")
        for case in cases:
            measured = time_case(ours, case, steps)
            after = meter.measure()
            samples[case].append(Sample(*measured, before.mean(after)))
            before = after
    return samples


def _numbers(option: str, given: str | None, default: str) -> list[int]:
    text = default if given is None else given
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of numbers from 1 on, such as 1,2,4", param_hint=option)
    return numbers


def _show(report: Report, title: str, results: Sequence[Result], meter: LimitMeter, is_compiled: bool) -> None:
    read, multiply = spread(meter.bytes_per_s), spread(meter.operations_per_s)
    report.add(
        {"limit_bytes_per_s": read, "limit_operations_per_s": multiply, "limit_product": meter.product}, *results
    )
    rows = [["reading, GB/s", read.text(1, 1e-9)], [f"multiplying in {meter.product}, GFLOP/s", multiply.text(0, 1e-9)]]
    report.print_table("The machine's limits during the run: median (least to most)", ("limit", "measured"), rows)
    prefill = [result for result in results if result.phase == "prefill"]
    decode = [result for result in results if result.phase == "decode"]
    rates = ("tokens/s", "GB/s", "GFLOP/s", "% of bound", *(("% outside kernels",) if is_compiled else ()))
    report.print_table(
        f"Prefill: {title}",
        ("prompt", "chunk", "ms: median (least to most)", *rates),
        [[each.num_tokens, each.chunk_tokens, *_cells(each, is_compiled)] for each in prefill],
        num_text_columns=0,
    )
    report.print_table(
        f"Decode: {title}",
        ("context", "batch", "ms a step: median (least to most)", *rates),
        [[each.num_tokens, each.batch_size, *_cells(each, is_compiled)] for each in decode],
        num_text_columns=0,
    )
    report.note(HOW_MEASURED)
    if is_compiled:
        report.note(OUTSIDE)
    _plot(report, title, prefill, decode)


def _cells(result: Result, is_compiled: bool) -> list[object]:
    outside = [result.percent_outside_kernels] if is_compiled else []
    rates = [result.tokens_per_s, result.gb_per_s, result.gflop_per_s, result.percent_of_bound]
    return [result.seconds.text(1, 1000), *rates, *outside]


def _plot(report: Report, title: str, prefill: Sequence[Result], decode: Sequence[Result]) -> None:
    by_chunk: dict[str, list[Result]] = defaultdict(list)
    for size in sorted({each.chunk_tokens or 0 for each in prefill}):
        for each in prefill:
            if each.chunk_tokens == min(size, each.num_tokens):
                by_chunk[f"chunks of {size}"].append(each)
    by_context: dict[str, list[Result]] = defaultdict(list)
    for each in decode:
        by_context[f"behind {each.num_tokens:,} tokens"].append(each)
    curves = {
        label: ([float(each.num_tokens) for each in line], [each.tokens_per_s for each in line])
        for label, line in by_chunk.items()
    }
    report.plot_lines("engine-prefill", f"Prefill: {title}", "tokens in the prompt", "tokens/s", curves, log_x=True)
    curves = {
        label: ([float(each.batch_size or 0) for each in line], [each.tokens_per_s for each in line])
        for label, line in by_context.items()
    }
    report.plot_lines("engine-decode", f"Decode: {title}", "sequences in the batch", "tokens/s", curves, log_x=True)
