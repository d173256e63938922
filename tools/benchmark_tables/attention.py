"""Tables of `kvrelay bench attention`: what stays of a prefix's KV, and what appending costs."""

from typing import Any

from benchmarks.statistics import Spread
from tools.benchmark_tables.documents import Document, Rows, table


@table("attention")
def kv_that_stays(document: Document) -> Rows:
    """Of the longest prefix."""
    results = _of_kind(document, "prefix")
    longest = max(each["num_prefix_tokens"] for each in results)
    rows = []
    for each in results:
        found = each["differences"]
        num_layers, num_elements = len(found["num_equal"]), found["num_elements"]
        if each["num_prefix_tokens"] == longest:
            equal_layers = sum(number == num_elements for number in found["num_equal"])
            percent = 100 * sum(found["num_equal"]) / (num_layers * num_elements)
            rows.append(
                [
                    each["label"],
                    f"{longest:,}",
                    f"{equal_layers} of {num_layers}",
                    f"{percent:.1f}",
                    _difference(found["max_difference"][0]),
                    _difference(max(found["max_difference"])),
                ]
            )
    titles = ["attention, computed by", "tokens of the prefix", "layers with equal bits", "equal elements, %"]
    return [[*titles, "largest difference, first layer", "any layer"], *rows]


@table("attention")
def kv_to_compute(document: Document) -> Rows:
    results = _of_kind(document, "append")
    is_timed = all(each["time_ratio"] for each in results)
    titles = ["tokens of the prefix", "appended", "KV computed, causal", "two-way", "times as many"]
    rows = []
    for each in results:
        counts = [each[name] for name in ("num_prefix_tokens", "num_new_tokens", "causal_tokens", "two_way_tokens")]
        row = [*(f"{count:,}" for count in counts), f"{each['two_way_tokens'] / each['causal_tokens']:.1f}"]
        if is_timed:
            row += [Spread(**each[name]).text(1) for name in ("causal_ms", "two_way_ms", "time_ratio")]
        rows.append(row)
    return [titles + (["causal, ms", "two-way, ms", "times as long"] if is_timed else []), *rows]


@table("attention")
def tokens_from_kept_kv(document: Document) -> Rows:
    rows = []
    for each in _of_kind(document, "generation"):
        equal, num_tokens = each["num_equal"], each["num_tokens"]
        numbers = [len(equal), num_tokens, equal.count(num_tokens), min(equal), max(equal)]
        rows.append([each["attention"], *(f"{number}" for number in numbers)])
    titles = ["attention", "texts", "tokens generated", "texts that never differ"]
    return [[*titles, "equal tokens, least", "most"], *rows]


def _of_kind(document: Document, kind: str) -> list[dict[str, Any]]:
    return [each for each in document.results if each["kind"] == kind]


def _difference(value: float) -> str:
    return f"{value:.1e}" if value else "0"
