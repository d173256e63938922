"""Tables of `kvrelay bench peers`: kvrelay beside other engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics import Spread, spread
from tools.benchmark_tables.documents import Document, Rows, table, verdict

PEERS = (
    "kvrelay",
    "kvrelay-int8",
    "kvrelay-service",
    "kvrelay-service-int8",
    "openvino",
    "llama-cpp",
    "llama-cpp-q8",
    "ctranslate2",
    "transformers",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A measure of one product; values by round."""

    title: str
    weights: str
    values: Sequence[float]

    @property
    def spread(self) -> Spread:
        return spread(self.values)


def measured(document: Document, run: str, measure: str) -> dict[str, Measured]:
    """By the product's name, in the order of PEERS."""
    found = {
        result["peer"]: Measured(_title(result), result["weights"], result["values"])
        for result in document.results
        if (result["run"], result["measure"]) == (run, measure)
    }
    return {peer: found[peer] for peer in PEERS if peer in found}


def ratio(above: Measured, below: Measured) -> Spread:
    """Round by round."""
    return spread([a / b for a, b in zip(above.values, below.values, strict=True)])


@table("peers-2-threads")
def engines(document: Document) -> Rows:
    columns = (
        ("decode, 1 stream, tok/s", "w1", "tokens_per_s", 1, 1),
        ("TTFT of 32, ms", "ttft-32", "ttft_s", 0, 1000),
        ("of 512, s", "ttft-512", "ttft_s", 2, 1),
        ("of 2,048, s", "ttft-2048", "ttft_s", 2, 1),
        ("16 at once, tok/s", "w2", "tokens_per_s", 0, 1),
        ("mean TTFT of 16, s", "w2", "ttft_s", 2, 1),
    )
    cells = [measured(document, run, measure) for _, run, measure, _, _ in columns]
    rows = [
        [each.title, *(cells[i][peer].spread.text(columns[i][3], columns[i][4]) for i in range(len(columns)))]
        for peer, each in cells[0].items()
    ]
    return [["", *(column[0] for column in columns)], *rows]


@table("peers-2-threads")
def engine_goals(document: Document) -> Rows:
    decode, batch, first = (
        measured(document, *each) for each in (("w1", "tokens_per_s"), ("w2", "tokens_per_s"), ("ttft-2048", "ttft_s"))
    )
    best = max(("openvino", "llama-cpp", "ctranslate2"), key=lambda peer: decode[peer].spread.median)
    goals = (
        (f"f32 decode, engine ÷ best of three, {decode[best].title}", 0.95, decode["kvrelay"], decode[best]),
        ("f32 decode, engine ÷ transformers", 2, decode["kvrelay"], decode["transformers"]),
        ("f32 TTFT of 2,048, OpenVINO ÷ engine", 0.95, first["openvino"], first["kvrelay"]),
        ("int8 decode, engine ÷ llama.cpp Q8_0", 1, decode["kvrelay-int8"], decode["llama-cpp-q8"]),
        ("int8 decode, service ÷ llama.cpp Q8_0", 1, decode["kvrelay-service-int8"], decode["llama-cpp-q8"]),
        ("16 at once, service f32 ÷ OpenVINO", 1, batch["kvrelay-service"], batch["openvino"]),
        ("16 at once, service int8 ÷ OpenVINO", 1.5, batch["kvrelay-service-int8"], batch["openvino"]),
        ("16 at once, engine int8 ÷ engine f32", 2.5, batch["kvrelay-int8"], batch["kvrelay"]),
    )
    rows = []
    for what, goal, above, below in goals:
        reached = ratio(above, below)
        rows.append([what, f"≥ {goal:g}", reached.text(2), verdict(reached.median, goal)])
    return [["", "goal", "reached", ""], *rows]


@table("peers-16-at-once")
def engines_later(document: Document) -> Rows:
    decode, batch = (measured(document, run, "tokens_per_s") for run in ("w1", "w2"))
    first = measured(document, "w2", "ttft_s")
    rows = []
    for peer, each in decode.items():
        ratios = (
            ratio(each, decode["openvino"]),
            ratio(batch[peer], batch["openvino"]),
            ratio(first["openvino"], first[peer]),
        )
        beside = ["" if peer == "openvino" else times.text(2) for times in ratios]
        own = (each.spread.text(1), batch[peer].spread.text(0), first[peer].spread.text(2))
        rows.append([each.title, *(cell for pair in zip(own, beside, strict=True) for cell in pair)])
    titles = [
        "",
        "1 stream, tok/s",
        "÷ OpenVINO",
        "16 at once, tok/s",
        "÷ OpenVINO",
        "mean TTFT of 16, s",
        "OpenVINO ÷ it",
    ]
    return [titles, *rows]


@table("peers-1-thread")
def engines_on_one_thread(document: Document) -> Rows:
    rows = [[each.title, each.spread.text(1)] for each in measured(document, "w1", "tokens_per_s").values()]
    return [["", "decode, 1 stream, tok/s"], *rows]


@table("peers-long-prompts")
def long_prompts(document: Document) -> Rows:
    columns = [
        *(
            (f"{name} {what}, ms", run, f"itl_{name}_ms", 0)
            for run, what in (("w3-quiet", "alone"), ("w3", "beside long prompts"))
            for name in ("p50", "p99", "max")
        ),
        ("TTFT of the long prompts (2,048), s", "w3", "long_ttft_s", 1),
    ]
    cells = [measured(document, run, measure) for _, run, measure, _ in columns]
    rows = [
        [each.title, *(cell[peer].spread.text(column[3]) for cell, column in zip(cells, columns, strict=True))]
        for peer, each in cells[0].items()
    ]
    return [["", *(column[0] for column in columns)], *rows]


@table("peers-long-prompts")
def long_prompt_goals(document: Document) -> Rows:
    alone = measured(document, "w3-quiet", "itl_p99_ms")
    tail, longest = (measured(document, "w3", f"itl_{name}_ms") for name in ("p99", "max"))
    first = measured(document, "w3", "long_ttft_s")
    rows = []
    for peer, slowdown in (("kvrelay-service", 2), ("kvrelay-service-int8", 1.25)):
        goals = (
            ("p99, OpenVINO ÷ it", ratio(tail["openvino"], tail[peer]), 10, True),
            ("longest gap, OpenVINO ÷ it", ratio(longest["openvino"], longest[peer]), 10, True),
            ("p99 beside long prompts ÷ alone", ratio(tail[peer], alone[peer]), 1.5, False),
            ("TTFT of the long prompts, it ÷ OpenVINO", ratio(first[peer], first["openvino"]), slowdown, False),
        )
        for what, reached, goal, is_least in goals:
            bounds = (reached.min, reached.max)
            held = [(value >= goal if is_least else value <= goal) for value in bounds]
            word = "met" if all(held) else "met in one of two rounds" if any(held) else "**missed**"
            rows.append([tail[peer].title, what, f"{'≥' if is_least else '≤'} {goal:g}", reached.text(2), word])
    return [["", "", "goal", "reached", ""], *rows]


def _title(result: dict[str, Any]) -> str:
    """The product with its version, as people write it."""
    if result["peer"].startswith("kvrelay"):
        return str(result["title"])
    return f"{result['title']} ({result['version'].partition('-')[0]})"
