"""`kvrelay bench variants`: engines of other settings, or of other versions of the source, beside
one another.

On a shared machine one run is faster than the next by more than most changes are worth. So each
variant has a process, and these take turns after a few steps, in an order that is drawn anew in
each round; what counts is the ratio to the first variant in the same round. Processes are started
anew some times, for where their memory lies differs and that counts too.
"""

import json as json_format
import os
import random
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import variant_process
from benchmarks.engine_cases import Case, decode_cases, pool_tokens, prefill_cases
from benchmarks.report import Json, Plots, Report
from benchmarks.statistics import Spread, percentile, spread
from benchmarks.weight_choices import Weights, make_weights
from kvrelay.errors import ConfigError
from kvrelay.models.store import DEMO_MODEL

THIS_TREE = Path(__file__).parent.parent
SEED = 0
ANSWER_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine's source and settings."""

    name: str
    tree: Path
    settings: Mapping[str, str | None] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Result:
    """A case of a variant."""

    variant: str
    phase: str
    num_tokens: int
    chunk_tokens: int | None
    batch_size: int | None
    seconds: Spread
    ratio: Spread
    """Of its time to that of the first variant, both in the same round."""
    ratio_quartiles: tuple[float, float]


class VariantProcess:
    """A running engine."""

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        self._process = process
        self._name = name

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ConfigError: the process ended, with its error on the terminal, or was ended since it
                did not answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        deadline = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        deadline.start()
        try:
            self._process.stdin.write(json_format.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            deadline.cancel()
        if not line:
            raise ConfigError(f"the engine of variant {self._name!r} ended; its error is above")
        answer: dict[str, Any] = json_format.loads(line)
        return answer


@contextmanager
def running(variant: Variant, model: str, threads: int, num_pool_tokens: int) -> Iterator[VariantProcess]:
    """An engine, loaded."""
    # -P: only the tree's own modules are to be found, not those beside the script.
    command = [sys.executable, "-P", variant_process.__file__]
    environment = os.environ | {"PYTHONPATH": str(variant.tree)}
    with subprocess.Popen(
        command, cwd=variant.tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        engine = VariantProcess(process, variant.name)
        try:
            engine.ask(model=model, threads=threads, num_pool_tokens=num_pool_tokens, settings=variant.settings)
            yield engine
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def command(
    model: Annotated[str, typer.Option("--model", help="Model.")] = DEMO_MODEL,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    tree: Annotated[
        list[Path] | None,
        typer.Option("--tree", help="Folder of another version of the source; repeatable. This one is first."),
    ] = None,
    quantize: Annotated[list[str] | None, typer.Option("--quantize", help="none or int8; repeatable.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="As a worker's --dtype, beside --quantize none; repeatable.")
    ] = None,
    bfloat16_activations: Annotated[
        list[str] | None,
        typer.Option("--bfloat16-activations", help="As a worker's, beside --dtype bfloat16; repeatable."),
    ] = None,
    kv_dtype: Annotated[
        list[str] | None, typer.Option("--kv-dtype", help="As a worker's --kv-dtype; repeatable.")
    ] = None,
    kernel_variant: Annotated[
        list[str] | None, typer.Option("--kernel-variant", help="As a worker's --kernel-variant; repeatable.")
    ] = None,
    prompt_lengths: Annotated[str, typer.Option("--prompt-lengths", help="Tokens of prompts, with commas.")] = "256",
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=1, help="Prompt tokens a step.")] = 256,
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="Sequences that decode, with commas.")] = "1,16",
    context_lengths: Annotated[
        str, typer.Option("--context-lengths", help="Tokens that they have, with commas.")
    ] = "160",
    restarts: Annotated[int, typer.Option("--restarts", min=1, help="How often all processes are started.")] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Turns of each case after a start.")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Decode steps of a turn.")] = 6,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Engines of several settings or versions in turns of a few steps: how their times relate."""
    from benchmarks.engine_steps import usable_cores

    report = Report("variants", json, plots)
    trees = [THIS_TREE, *(tree or [])]
    variants = make_variants(
        trees,
        make_weights(quantize or ["none"], dtype or ["auto"], bfloat16_activations or ["split"]),
        kv_dtype or ["auto"],
        kernel_variant or ["auto"],
    )
    if len(variants) < 2:
        raise ConfigError(
            "there is only one variant: give --tree, or --quantize, --dtype, --bfloat16-activations, --kv-dtype "
            "or --kernel-variant several times"
        )
    cases = [
        *prefill_cases(_numbers("--prompt-lengths", prompt_lengths), [chunk_tokens]),
        *decode_cases(_numbers("--batch-sizes", batch_sizes), _numbers("--context-lengths", context_lengths)),
    ]
    num_threads = threads or usable_cores()
    measured: dict[tuple[str, Case], list[float]] = defaultdict(list)
    chance = random.Random(SEED)
    for start in range(restarts):
        with ExitStack() as stack:
            report.progress(f"start {start + 1} of {restarts}")
            engines = [
                stack.enter_context(running(each, model, num_threads, pool_tokens(cases, steps))) for each in variants
            ]
            for case in cases:
                report.progress(f"start {start + 1} of {restarts}: {case_name(case)}")
                _measure(case, variants, engines, rounds, steps, chance, measured)
    results = [_result(variant.name, case, measured, variants[0].name) for case in cases for variant in variants]
    report.add({"num_threads": num_threads, "variants": [variant.name for variant in variants]}, *results)
    _show(report, results, num_threads)
    report.finish()


def make_variants(
    trees: Sequence[Path],
    weights: Sequence[Weights],
    kv_dtypes: Sequence[str],
    kernel_variants: Sequence[str] = ("auto",),
) -> list[Variant]:
    """Each source with each choice of settings.

    Raises:
        ConfigError: a folder has no source of kvrelay.
    """
    variants = []
    for folder in dict.fromkeys(tree.resolve() for tree in trees):
        if not (folder / "benchmarks" / "engine_cases.py").is_file():
            raise ConfigError(f"--tree {folder} has no benchmarks/engine_cases.py; give the root of a checkout")
        for kind, kv_dtype, kernels in product(weights, dict.fromkeys(kv_dtypes), dict.fromkeys(kernel_variants)):
            parts = [str(folder)] if len(trees) > 1 else []
            parts += [kind.name] if len(weights) > 1 else []
            parts += [f"KV {kv_dtype}"] if len(kv_dtypes) > 1 else []
            parts += [kernels] if len(kernel_variants) > 1 else []
            settings = {
                **kind.settings,
                "kv_dtype": None if kv_dtype == "auto" else kv_dtype,
                "kernel_variant": None if kernels == "auto" else kernels,
            }
            variants.append(Variant(", ".join(parts), folder, settings))
    return variants


def case_name(case: Case) -> str:
    """For people."""
    if case.batch_size is None:
        return f"prompt of {case.num_tokens} in chunks of {case.chunk_tokens}"
    return f"decode, {case.batch_size} x {case.num_tokens}"


def _measure(
    case: Case,
    variants: Sequence[Variant],
    engines: Sequence[VariantProcess],
    rounds: int,
    steps: int,
    chance: random.Random,
    measured: dict[tuple[str, Case], list[float]],
) -> None:
    for engine in engines:
        engine.ask(case=astuple(case), steps=1)  # not counted
    for _ in range(rounds):
        turns = list(zip(variants, engines, strict=True))
        chance.shuffle(turns)
        for variant, engine in turns:
            measured[variant.name, case].append(engine.ask(case=astuple(case), steps=steps)["seconds"])


def _result(name: str, case: Case, measured: dict[tuple[str, Case], list[float]], first: str) -> Result:
    seconds = measured[name, case]
    ratios = [ours / theirs for ours, theirs in zip(seconds, measured[first, case], strict=True)]
    return Result(
        name,
        case.phase,
        case.num_tokens,
        case.chunk_tokens,
        case.batch_size,
        spread(seconds),
        spread(ratios),
        (percentile(ratios, 25), percentile(ratios, 75)),
    )


def _show(report: Report, results: Sequence[Result], num_threads: int) -> None:
    rows = [
        [
            case_name(Case(each.phase, each.num_tokens, each.chunk_tokens, each.batch_size)),
            each.variant,
            each.seconds.text(1, 1000),
            f"{each.ratio.median:.3f} ({each.ratio_quartiles[0]:.3f} to {each.ratio_quartiles[1]:.3f})",
        ]
        for each in results
    ]
    columns = ["case", "variant", "ms: median (least to most)", "ratio to the first: median (quartiles)"]
    report.print_table(f"Variants in turns, {num_threads} threads", columns, rows, num_text_columns=2)


def _numbers(option: str, text: str) -> list[int]:
    """Empty where there are to be none."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ConfigError(f"{option} {text!r} is no list of numbers from 1 on, such as 1,2,4")
    return numbers
