"""`kvrelay bench perplexity`: what quantization costs in quality. Perplexity of one text by our
engine with each choice of types.

Perplexity is exp of the mean negative log probability that the model gives to the text's next token
(Jelinek et al. 1977, "Perplexity: a measure of the difficulty of speech recognition tasks"), here
in windows: the first token of a window is given.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
import xxhash
from tokenizers import Tokenizer

from benchmarks.engine_steps import EngineSteps, load_engine, usable_cores
from benchmarks.installed_text import PACKAGES, installed_text
from benchmarks.report import Json, Plots, Report
from benchmarks.weight_choices import make_weights
from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.errors import ConfigError
from kvrelay.models.store import DEMO_MODEL

CHARACTERS_PER_TOKEN = 8
"""More than any text has, so that so many tokens are found."""
CHUNK_TOKENS = 256
DEFAULT_TEXT = f"Text: licences and Python sources of the installed packages {', '.join(PACKAGES)}, in turns."


@dataclass(frozen=True, slots=True)
class Score:
    """How well one token of the text was foreseen."""

    negative_log_probability: float
    likeliest: int
    """The token that greedy decoding would have chosen."""


@dataclass(frozen=True, slots=True)
class Result:
    """One choice of types."""

    quantize: str
    kv_dtype: str
    perplexity: float
    ratio: float
    """To the first choice's perplexity."""
    window_ratios: tuple[float, ...]
    """The same in each window."""
    percent_same_choice: float
    """Positions where greedy decoding would choose what it chooses with the first choice of types.
    """


def command(
    model: Annotated[str, typer.Option("--model", help="Model.")] = DEMO_MODEL,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text file. Default: licences and sources that are installed.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="So many tokens from its beginning.")] = 16_384,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens that see one another.")] = 1024,
    quantize: Annotated[
        list[str] | None, typer.Option("--quantize", help="Repeatable. Default: none and int8.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="Of what is not quantized; repeatable. Default: auto.")
    ] = None,
    bfloat16_activations: Annotated[
        list[str] | None, typer.Option("--bfloat16-activations", help="Repeatable. Default: split.")
    ] = None,
    kv_dtype: Annotated[list[str] | None, typer.Option("--kv-dtype", help="Repeatable. Default: auto.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Perplexity of a text in float32, int8 and other types, window by window, and how often the
    likeliest token is the same.
    """
    report = Report("perplexity", json, plots)
    content = _read(text, tokens)
    weights = make_weights(quantize or ["none", "int8"], dtype or ["auto"], bfloat16_activations or ["split"])
    choices = list(product(weights, kv_dtype or ["auto"]))
    results: list[Result] = []
    first: list[list[Score]] = []
    token_ids: list[int] = []
    for kind, kv in choices:
        report.progress(f"weights {kind.name}, KV {kv}")
        ours = load_engine(model, threads or usable_cores(), window, kv_dtype=kv, **kind.settings)
        token_ids = token_ids or _tokenize(ours.engine.folder, content, tokens)
        scores = [score_window(ours, part) for part in split(token_ids, window)]
        first = first or scores
        results.append(compare(kind.name, ours.engine.model.kv_layout.dtype, scores, first))
    num_scored = sum(map(len, first))
    digest = xxhash.xxh3_128_hexdigest(" ".join(map(str, token_ids)).encode())
    report.add({"num_scored_tokens": num_scored, "window": window, "token_ids_xxh3_128": digest}, *results)
    report.print_table(
        f"{model}: perplexity over {num_scored:,} tokens in windows of {window:,}",
        ("weights", "KV", "perplexity", "to the first", "windows: least to most", "same choice %"),
        [_row(result) for result in results],
        num_text_columns=2,
    )
    if text is None:
        report.note(DEFAULT_TEXT)
    report.plot_lines(
        "perplexity",
        "Perplexity against that of the first choice, by window",
        "window",
        "ratio",
        {
            f"{result.quantize}, KV {result.kv_dtype}": (range(1, 1 + len(result.window_ratios)), result.window_ratios)
            for result in results
        },
    )
    report.finish()


def split(token_ids: Sequence[int], window: int) -> list[Sequence[int]]:
    """Windows of so many tokens; the last may be shorter, but has two at least."""
    windows = [token_ids[begin : begin + window] for begin in range(0, len(token_ids), window)]
    return [part for part in windows if len(part) > 1]


def score_window(ours: EngineSteps, token_ids: Sequence[int]) -> list[Score]:
    """Scores of all tokens but the first."""
    table = ours.engine.blocks.allocate(token_ids, "")
    scores: list[Score] = []
    for begin in range(0, len(token_ids) - 1, CHUNK_TOKENS):
        part = list(token_ids[begin : min(begin + CHUNK_TOKENS, len(token_ids) - 1)])
        logits = ours.engine.model_runner.run([SequenceInput(part, begin, table.blocks, num_logits=len(part))])
        logprobs = logits.double().log_softmax(dim=-1)  # [len(part), vocab_size]
        following = torch.tensor(token_ids[begin + 1 : begin + 1 + len(part)], device=logits.device).unsqueeze(1)
        found = logprobs.gather(1, following).squeeze(1).tolist()
        scores += [Score(-value, token) for value, token in zip(found, logits.argmax(dim=-1).tolist(), strict=True)]
    ours.engine.blocks.release(table)
    return scores


def compare(
    quantize: str, kv_dtype: str, windows: Sequence[Sequence[Score]], first: Sequence[Sequence[Score]]
) -> Result:
    """Perplexity of all windows and what it is to the first choice's."""
    pairs = [pair for ours, theirs in zip(windows, first, strict=True) for pair in zip(ours, theirs, strict=True)]
    ours = perplexity([score for score, _ in pairs])
    return Result(
        quantize=quantize,
        kv_dtype=kv_dtype,
        perplexity=ours,
        ratio=ours / perplexity([score for _, score in pairs]),
        window_ratios=tuple(perplexity(part) / perplexity(other) for part, other in zip(windows, first, strict=True)),
        percent_same_choice=100 * statistics.mean(score.likeliest == other.likeliest for score, other in pairs),
    )


def perplexity(scores: Sequence[Score]) -> float:
    """Of one score or more."""
    return math.exp(statistics.fmean(score.negative_log_probability for score in scores))


def _read(text: Path | None, num_tokens: int) -> str:
    """The text, or as much of it as is needed.

    Raises:
        ConfigError: it cannot be read.
    """
    if text is None:
        return installed_text(CHARACTERS_PER_TOKEN * num_tokens)
    try:
        return text.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{text} cannot be read: {error}") from error


def _tokenize(folder: Path, content: str, num_tokens: int) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode(content, add_special_tokens=False).ids[:num_tokens]
    if len(token_ids) < num_tokens:
        raise ConfigError(
            f"the text has {len(token_ids):,} tokens; ask for fewer with --tokens, or name a longer one with --text"
        )
    return token_ids


def _row(result: Result) -> list[object]:
    spread = f"{min(result.window_ratios):.4f} to {max(result.window_ratios):.4f}"
    return [
        result.quantize,
        result.kv_dtype,
        f"{result.perplexity:.4f}",
        f"{result.ratio:.4f}",
        spread,
        f"{result.percent_same_choice:.2f}",
    ]
