"""`kvrelay bench attention`: why a KV cache can be kept and sent.

Compares a prefix's keys and values alone and before a continuation, under causal and two-way
attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from benchmarks.engine_steps import EngineSteps, load_engine, usable_cores
from benchmarks.installed_text import installed_text
from benchmarks.kv_differences import KV, KVDifferences, compare_kv, tokens_to_compute
from benchmarks.masked_model import MaskedModel
from benchmarks.report import Json, Plots, Report
from benchmarks.statistics import Spread, spread
from kvrelay.errors import ConfigError
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.models.store import DEMO_MODEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARACTERS_PER_TOKEN = 8
PROMPT_TOKENS = 24
"""Of the texts that are continued."""
SMALLEST_DRAWN = 1e-8
TWO_WAY = "two-way: every token of the prompt sees every other one. Causal: a token sees those before it and itself."
SAME_SHAPE = (
    "Same shape: the prefix alone has rows behind it that it does not see, so that a library multiplies matrices of one"
    " shape. Own shapes: it has none, and a library may sum in another order."
)
TRAINED = "The model was trained with causal attention: what it says under a two-way mask means nothing."
NOT_SAVED = (
    "The two-way time computes K and V of the first layer for the whole prompt, though it could keep the prefix's."
)


@dataclass(frozen=True, slots=True)
class Form:
    """Who computes, and who sees whom."""

    engine: str
    attention: str
    has_same_shape: bool | None
    """None: rows are computed independently of each other, so the shape does not matter."""

    @property
    def label(self) -> str:
        shape = {None: "", True: ", same shape", False: ", own shapes"}[self.has_same_shape]
        return f"{self.attention}, {self.engine}{shape}"


@dataclass(frozen=True, slots=True)
class PrefixResult:
    """One prefix in one form."""

    form: Form
    num_prefix_tokens: int
    num_new_tokens: int
    num_continuations: int
    differences: KVDifferences


@dataclass(frozen=True, slots=True)
class AppendResult:
    """Counts are of tokens whose K and V are computed to append some, all layers together."""

    num_prefix_tokens: int
    num_new_tokens: int
    causal_tokens: int
    two_way_tokens: int
    two_way_layers: tuple[int, ...]
    """Tokens by layer."""
    causal_ms: Spread | None
    """None: not measured."""
    two_way_ms: Spread | None
    time_ratio: Spread | None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """Tokens that are the same with KV kept and made anew, for each prompt."""

    attention: str
    num_tokens: int
    num_equal: tuple[int, ...]


def command(
    model: Annotated[str, typer.Option("--model", help="Model.")] = DEMO_MODEL,
    prefix_tokens: Annotated[str, typer.Option("--prefix-tokens", help="Lengths of the prefix.")] = "32,128,512",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens that follow.")] = 16,
    continuations: Annotated[int, typer.Option("--continuations", min=1, help="Texts that follow.")] = 3,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Texts that are continued.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens that continue them.")] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, help="Both forms are timed in turns; 0 takes no times.")
    ] = 9,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")] = None,
    json: Json = None,
    plots: Plots = None,
) -> None:
    """Keys and values of a prefix under causal and two-way attention: which stay the same when text
    follows, and what appending costs.
    """
    lengths = _lengths(prefix_tokens)
    num_threads = threads or usable_cores()
    report = Report("attention", json, plots)
    num_needed = max(lengths[-1] + continuations * new_tokens, prompts * PROMPT_TOKENS)
    ours = load_engine(model, num_threads, lengths[-1] + new_tokens + 1, dtype="float32", kv_dtype="float32")
    limit_tokens = ours.engine.model.max_context_tokens
    if max(lengths[-1] + new_tokens, PROMPT_TOKENS + tokens) > limit_tokens:
        raise ConfigError(
            f"{model} takes {limit_tokens:,} tokens; ask for fewer --prefix-tokens, --new-tokens or --tokens"
        )
    theirs = MaskedModel(ours.engine.folder, num_threads)
    text = _tokenize(ours, num_needed)
    results = []
    appended = []
    for num_tokens in lengths:
        report.progress(f"prefix of {num_tokens:,}")
        followed = [text[num_tokens + number * new_tokens :][:new_tokens] for number in range(continuations)]
        found = list(_compare_forms(ours, theirs, text[:num_tokens], followed))
        results += found
        report.progress(f"append to {num_tokens:,}")
        appended.append(_measure_append(theirs, found, text[: num_tokens + new_tokens], rounds))
    generated = [
        _compare_generation(report, theirs, text, prompts, tokens, is_two_way=is_two_way)
        for is_two_way in (False, True)
    ]
    _add(report, num_threads, ours, results, appended, generated)
    _show(report, results, appended, generated)
    _plot(report, [each for each in results if each.num_prefix_tokens == lengths[-1]])
    report.finish()


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise ConfigError(f"--prefix-tokens is {text!r}: give numbers from 1, such as 64,256")
    return lengths


def _tokenize(ours: EngineSteps, num_tokens: int) -> list[int]:
    tokenizer = Tokenizer.from_file(str(ours.engine.folder / "tokenizer.json"))
    content = installed_text(CHARACTERS_PER_TOKEN * num_tokens)
    token_ids: list[int] = tokenizer.encode(content, add_special_tokens=False).ids[:num_tokens]
    if len(token_ids) < num_tokens:
        raise ConfigError(f"the installed text has {len(token_ids):,} tokens; ask for less than {num_tokens:,}")
    return token_ids


def _compare_forms(
    ours: EngineSteps, theirs: MaskedModel, prefix: Sequence[int], followed: Sequence[Sequence[int]]
) -> Iterator[PrefixResult]:
    num_tokens, num_rows = len(prefix), len(prefix) + len(followed[0])
    whole = [[*prefix, *each] for each in followed]

    def result(form: Form, alone: KV, others: Sequence[KV]) -> PrefixResult:
        return PrefixResult(form, num_tokens, len(followed[0]), len(followed), compare_kv(alone, others))

    alone = engine_keys_and_values(ours, prefix, num_tokens)
    is_compiled = ours.engine.model_runner.model.kernels is not None
    yield result(
        Form("kvrelay", "causal", None if is_compiled else False),
        alone,
        [engine_keys_and_values(ours, each, num_tokens) for each in whole],
    )
    for is_two_way, attention in ((False, "causal"), (True, "two-way")):
        others = [theirs.keys_and_values(each, num_tokens, two_way=is_two_way) for each in whole]
        padded = theirs.padded_keys_and_values(prefix, num_rows, two_way=is_two_way)
        yield result(Form("transformers", attention, has_same_shape=True), padded, others)
        bare = theirs.keys_and_values(prefix, num_tokens, two_way=is_two_way)
        yield result(Form("transformers", attention, has_same_shape=False), bare, others)


def engine_keys_and_values(ours: EngineSteps, token_ids: Sequence[int], num_tokens: int) -> KV:
    """K and V of the first tokens, as a worker would ship them; all tokens are one step."""
    sequence = ours.start(token_ids)
    ours.step([(sequence, len(token_ids))])
    layout = ours.engine.model.kv_layout
    span = KVSpan(0, layout.num_layers, 0, num_tokens)
    payload = bytearray(span.num_bytes(layout))
    assert sequence.block_table is not None, "the sequence holds its blocks"
    ours.engine.cache.export_kv(memoryview(payload), span, sequence.block_table.blocks)
    ours.release(sequence)
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    return np.frombuffer(payload, np.float32).reshape(shape)


def _measure_append(
    theirs: MaskedModel, results: Sequence[PrefixResult], token_ids: Sequence[int], rounds: int
) -> AppendResult:
    by_attention = {each.form.attention: each for each in results if each.form.has_same_shape}
    num_new = results[0].num_new_tokens
    causal, two_way = (tokens_to_compute(by_attention[name].differences, num_new) for name in ("causal", "two-way"))
    times = [theirs.append_seconds(token_ids, num_new) for _ in range(rounds and rounds + 1)][1:]
    return AppendResult(
        num_prefix_tokens=results[0].num_prefix_tokens,
        num_new_tokens=num_new,
        causal_tokens=sum(causal),
        two_way_tokens=sum(two_way),
        two_way_layers=two_way,
        causal_ms=spread([1000 * each for each, _ in times]) if times else None,
        two_way_ms=spread([1000 * each for _, each in times]) if times else None,
        time_ratio=spread([whole / part for part, whole in times]) if times else None,
    )


def _compare_generation(
    report: Report, theirs: MaskedModel, text: Sequence[int], num_prompts: int, num_tokens: int, *, is_two_way: bool
) -> GenerationResult:
    attention = "two-way" if is_two_way else "causal"
    equal = []
    for number in range(num_prompts):
        report.progress(f"{attention}: text {number + 1} of {num_prompts}")
        prompt = text[number * PROMPT_TOKENS :][:PROMPT_TOKENS]
        kept, anew = (theirs.generate(prompt, two_way=is_two_way, keeps_cache=keeps) for keeps in (True, False))
        pairs = islice(zip(kept, anew, strict=True), num_tokens)
        equal.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return GenerationResult(attention, num_tokens, tuple(equal))


def _add(
    report: Report,
    num_threads: int,
    ours: EngineSteps,
    results: Sequence[PrefixResult],
    appended: Sequence[AppendResult],
    generated: Sequence[GenerationResult],
) -> None:
    report.add(
        {
            "kind": "run",
            "model": ours.engine.model.name,
            "num_layers": ours.engine.model.kv_layout.num_layers,
            "engine": ours.engine.description,
            "num_threads": num_threads,
            "num_generation_prompt_tokens": PROMPT_TOKENS,
        }
    )
    report.add(*({"kind": "prefix", "label": each.form.label} | asdict(each) for each in results))
    report.add(*({"kind": "append"} | asdict(each) for each in appended))
    report.add(*({"kind": "generation"} | asdict(each) for each in generated))


def _show(
    report: Report,
    results: Sequence[PrefixResult],
    appended: Sequence[AppendResult],
    generated: Sequence[GenerationResult],
) -> None:
    num_layers = len(results[0].differences.num_equal)
    report.print_table(
        f"Keys and values of a prefix, alone and before {results[0].num_continuations} continuations of "
        f"{results[0].num_new_tokens}",
        ("form", "prefix", f"equal layers of {num_layers}", "equal elements %", "first layer", "largest difference"),
        [_prefix_row(each) for each in results],
    )
    report.print_table(
        "Tokens whose keys and values are computed to append, all layers together",
        ("prefix", "appended", "causal", "two-way", "times", "causal ms", "two-way ms", "times"),
        [_append_row(each) for each in appended],
        num_text_columns=0,
    )
    report.print_table(
        "Tokens generated alike with KV kept and made anew",
        ("attention", "of", "texts", "texts without a difference", "least", "most"),
        [
            [
                each.attention,
                each.num_tokens,
                len(each.num_equal),
                each.num_equal.count(each.num_tokens),
                min(each.num_equal),
                max(each.num_equal),
            ]
            for each in generated
        ],
    )
    for text in (TWO_WAY, SAME_SHAPE, TRAINED, NOT_SAVED):
        report.note(text)


def _prefix_row(result: PrefixResult) -> list[object]:
    found = result.differences
    num_layers = len(found.num_equal)
    return [
        result.form.label,
        result.num_prefix_tokens,
        len(found.equal_layers),
        100 * sum(found.num_equal) / (num_layers * found.num_elements),
        f"{found.max_difference[0]:.1e}",
        f"{max(found.max_difference):.1e}",
    ]


def _append_row(result: AppendResult) -> list[object]:
    times = [each and each.text(1) for each in (result.causal_ms, result.two_way_ms, result.time_ratio)]
    return [
        result.num_prefix_tokens,
        result.num_new_tokens,
        result.causal_tokens,
        result.two_way_tokens,
        result.two_way_tokens / result.causal_tokens,
        *times,
    ]


def _plot(report: Report, results: Sequence[PrefixResult]) -> None:
    def draw(axes: "Axes") -> None:
        for number, each in enumerate(results):
            differences = each.differences.max_difference
            # Thinner and thinner, so that equal curves show through.
            width = 1.2 * (len(results) - number)
            axes.plot(range(1, 1 + len(differences)), differences, label=each.form.label, linewidth=width)
        # A difference of nothing has a place too, at the bottom.
        axes.set_yscale("symlog", linthresh=SMALLEST_DRAWN)
        axes.set_ylim(bottom=-SMALLEST_DRAWN / 4)
        title = f"Keys and values of {results[0].num_prefix_tokens:,} tokens, once something follows them"
        axes.set(title=title, xlabel="layer", ylabel="largest difference to before")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)

    report.plot("attention-differences", draw)
