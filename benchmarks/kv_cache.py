"""`kvrelay bench kv-cache`: what a KV cache is for. Time per token with one and without, by our
engine and by transformers.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.engine_steps import EngineSteps, load_engine, usable_cores
from benchmarks.generation_curves import GenerationCurve, interpolated, median_curve, num_equal, sampled_steps
from benchmarks.random_models import save_random_gpt2
from benchmarks.report import Json, Plots, Report
from benchmarks.statistics import spread
from benchmarks.transformers_generation import TransformersGeneration
from kvrelay.errors import ConfigError
from kvrelay.models.store import DEMO_MODEL

GPT2 = "gpt2-random"
QUICK_TOKENS = 200
WARM_UP_TOKENS = 4
PUBLISHED = (
    "Published for GPT-2 (124M) and 1,000 new tokens on an Apple M1: 32.1 ± 0.7 s with the KV cache, 3,516.7 ± "
    "27 s without."
    " Another machine and another program; what compares is the ratio, 110."
)
RANDOM_WEIGHTS = (
    "gpt2-random is GPT-2 (124M) as its config describes it, with random weights: time does not depend on them."
)
UNCACHED = "Without the cache every new token recomputes the whole sequence as one prompt."
PLOTS = (("total", "time until a token is there", "seconds"), ("token", "time of each token", "milliseconds"))
SAMPLED = "Without the cache only every {every}th token was timed; the others are interpolated (--sampled)."


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run."""

    num_tokens: int
    prompt: tuple[int, ...]
    rounds: int
    uncached_rounds: int
    sample_every: int | None
    """None: every token is generated for real without a cache too."""


def command(
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens.")] = 1000,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_TOKENS} new tokens.")] = False,
    model: Annotated[
        list[str] | None, typer.Option("--model", help=f"{GPT2}, or a model; repeatable. Default: both.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompt.")] = 16,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Runs with the cache; all variants take turns.")] = 3,
    uncached_rounds: Annotated[int, typer.Option("--uncached-rounds", min=0, help="Runs without the cache.")] = 1,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Without the cache, time some of the tokens only.")
    ] = False,
    sample_every: Annotated[
        int, typer.Option("--sample-every", min=1, help="With --sampled: time one token in so many.")
    ] = 50,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Generation with and without a KV cache, by our engine and by transformers: total time, and
    time of each token by length.
    """
    num_threads = threads or usable_cores()
    plan = Plan(
        num_tokens=QUICK_TOKENS if quick else tokens,
        prompt=tuple(range(100, 100 + prompt_tokens)),
        rounds=rounds,
        uncached_rounds=uncached_rounds,
        sample_every=sample_every if sampled else None,
    )
    report = Report("kv-cache", json, plots)
    for name in model or [GPT2, DEMO_MODEL]:
        with _model_folder(name) as path:
            shown = Path(name).name
            _show(report, shown, _measure(report, shown, path, plan, num_threads), num_threads)
    for text in (PUBLISHED, RANDOM_WEIGHTS, UNCACHED):
        report.note(text)
    if plan.sample_every is not None:
        report.note(SAMPLED.format(every=plan.sample_every))
    report.finish()


@contextmanager
def _model_folder(name: str) -> Iterator[str]:
    """The model's name or, for random GPT-2, a folder that is gone afterwards."""
    if name != GPT2:
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="kvrelay-gpt2-") as folder:
        yield str(save_random_gpt2(Path(folder)))


def _measure(report: Report, name: str, path: str, plan: Plan, num_threads: int) -> list[GenerationCurve]:
    ours = load_engine(path, num_threads, len(plan.prompt) + plan.num_tokens)
    limit_tokens = ours.engine.model.max_context_tokens
    if len(plan.prompt) + plan.num_tokens > limit_tokens:
        raise ConfigError(f"{name} takes {limit_tokens} tokens; ask for fewer --tokens or --prompt-tokens")
    theirs = TransformersGeneration(ours.engine.folder, num_threads)
    _generate(ours, plan.prompt, WARM_UP_TOKENS, has_cache=True)
    theirs.generate(plan.prompt, WARM_UP_TOKENS, use_cache=True)
    curves: list[GenerationCurve] = []
    expected: list[int] = []
    for number in range(max(plan.rounds, plan.uncached_rounds)):
        for has_cache, engine in (
            (True, "kvrelay"),
            (True, "transformers"),
            (False, "kvrelay"),
            (False, "transformers"),
        ):
            if number >= (plan.rounds if has_cache else plan.uncached_rounds):
                continue
            is_sampled = plan.sample_every is not None and not has_cache
            report.progress(f"{name}: {engine}, {'with' if has_cache else 'without'} cache, round {number + 1}")
            token_ids: list[int] = []
            if is_sampled:
                seconds = _sampled_seconds(ours if engine == "kvrelay" else theirs, plan)
            elif engine == "kvrelay":
                token_ids, seconds = _generate(ours, plan.prompt, plan.num_tokens, has_cache=has_cache)
            else:
                token_ids, seconds = theirs.generate(plan.prompt, plan.num_tokens, use_cache=has_cache)
            expected = expected or token_ids
            curves.append(
                GenerationCurve(
                    model=name,
                    engine=engine,
                    has_cache=has_cache,
                    round=number,
                    is_sampled=is_sampled,
                    num_prompt_tokens=len(plan.prompt),
                    token_ms=tuple(1000 * value for value in seconds),
                    num_equal_tokens=num_equal(token_ids, expected) if token_ids else None,
                )
            )
    return curves


def _generate(
    ours: EngineSteps, prompt: Sequence[int], num_tokens: int, *, has_cache: bool
) -> tuple[list[int], list[float]]:
    """The new tokens, and the seconds that each took."""
    token_ids = list(prompt)
    seconds = []
    sequence = None
    for _ in range(num_tokens):
        begin_s = time.perf_counter()
        if sequence is None:
            sequence = ours.start(token_ids)
        ours.step([(sequence, sequence.num_uncomputed_tokens)])
        token_ids.append(sequence.token_ids[-1])
        if not has_cache:
            ours.release(sequence)
            sequence = None
        seconds.append(time.perf_counter() - begin_s)
    if sequence is not None:
        ours.release(sequence)
    return token_ids[len(prompt) :], seconds


def _sampled_seconds(engine: EngineSteps | TransformersGeneration, plan: Plan) -> list[float]:
    """Seconds of every new token without a cache; only some are timed, over tokens of no meaning."""
    assert plan.sample_every is not None
    steps = sampled_steps(plan.num_tokens, plan.sample_every)
    seconds = []
    for step in steps:
        token_ids = [*plan.prompt, *(plan.prompt[0] for _ in range(step))]
        if isinstance(engine, EngineSteps):
            seconds += _generate(engine, token_ids, 1, has_cache=False)[1]
        else:
            seconds.append(engine.forward_seconds(token_ids))
    return interpolated(steps, seconds)


def _show(report: Report, name: str, curves: Sequence[GenerationCurve], num_threads: int) -> None:
    variants: dict[str, list[GenerationCurve]] = defaultdict(list)
    for curve in curves:
        variants[curve.label].append(curve)
        report.add(
            asdict(curve) | {"num_threads": num_threads, "total_s": curve.total_s, "tokens_per_s": curve.tokens_per_s}
        )
    medians = {label: median_curve(same) for label, same in variants.items()}
    uncached_s = {curve.engine: curve.total_s for curve in medians.values() if not curve.has_cache}
    first = curves[0]
    report.print_table(
        f"{name}: {len(first.token_ms):,} new tokens behind a prompt of {first.num_prompt_tokens:,}, "
        f"{num_threads} threads",
        (
            "variant",
            "rounds",
            "total s",
            "tokens/s",
            "first ms",
            "last ms",
            "times faster than without",
            "equal tokens",
        ),
        [_row(same, medians[label], uncached_s.get(medians[label].engine)) for label, same in variants.items()],
    )
    for kind, title, unit in PLOTS:
        lines = {
            label: (curve.lengths, curve.cumulated_s if kind == "total" else curve.token_ms)
            for label, curve in medians.items()
        }
        report.plot_lines(
            f"kv-cache-{name}-{kind}", f"{name}: {title}", "tokens in the sequence", unit, lines, log_y=True
        )


def _row(curves: Sequence[GenerationCurve], median: GenerationCurve, uncached_s: float | None) -> list[object]:
    return [
        median.label,
        len(curves),
        spread([curve.total_s for curve in curves]).text(2),
        median.tokens_per_s,
        median.token_ms[0],
        median.token_ms[-1],
        uncached_s and uncached_s / median.total_s,
        median.num_equal_tokens,
    ]
