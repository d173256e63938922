"""Tables of `kvrelay bench attention`, from made-up documents: with times and without."""

from typing import Any

from tools.benchmark_tables.attention import kv_that_stays, kv_to_compute, tokens_from_kept_kv
from tools.benchmark_tables.documents import Document


def spread(median: float) -> dict[str, float]:
    return {"num_values": 3, "median": median, "min": median - 1, "max": median + 1}


def prefix(label: str, num_tokens: int, num_equal: list[int], max_difference: list[float]) -> dict[str, Any]:
    differences = {"num_elements": 200, "num_equal": num_equal, "max_difference": max_difference}
    return {"kind": "prefix", "label": label, "num_prefix_tokens": num_tokens, "differences": differences}


def appended(num_tokens: int, *, is_timed: bool) -> dict[str, Any]:
    times = {"causal_ms": spread(12.5), "two_way_ms": spread(100.0), "time_ratio": spread(8.0)}
    counts = {
        "num_prefix_tokens": num_tokens,
        "num_new_tokens": 10,
        "causal_tokens": 20,
        "two_way_tokens": 20 + num_tokens,
    }
    return {"kind": "append"} | counts | (times if is_timed else dict.fromkeys(times))


def document(*results: dict[str, Any]) -> Document:
    return Document("attention", "kvrelay bench attention", "2026-01-01", "1 core", [{"kind": "run"}, *results])


def test_what_stays_is_shown_of_the_longest_prefix() -> None:
    rows = kv_that_stays(
        document(
            prefix("causal, ours", 1000, [200, 200], [0.0, 0.0]),
            prefix("two-way", 9, [200, 0], [0.0, 3.0]),
            prefix("two-way", 1000, [200, 50], [0.0, 12.3456]),
        )
    )
    assert rows[1:] == [
        ["causal, ours", "1,000", "2 of 2", "100.0", "0", "0"],
        ["two-way", "1,000", "1 of 2", "62.5", "0", "1.2e+01"],
    ]


def test_times_are_shown_where_all_were_taken() -> None:
    head, *rows = kv_to_compute(document(appended(180, is_timed=True), appended(2000, is_timed=True)))
    assert rows[0] == [
        "180",
        "10",
        "20",
        "200",
        "10.0",
        "12.5 (11.5 to 13.5)",
        "100.0 (99.0 to 101.0)",
        "8.0 (7.0 to 9.0)",
    ]
    assert [len(row) for row in rows] == [len(head)] * 2
    head, *rows = kv_to_compute(document(appended(180, is_timed=True), appended(2000, is_timed=False)))
    assert rows == [["180", "10", "20", "200", "10.0"], ["2,000", "10", "20", "2,020", "101.0"]]
    assert len(head) == 5


def test_texts_that_never_differ_are_counted() -> None:
    result = {"kind": "generation", "attention": "two-way", "num_tokens": 32, "num_equal": [32, 1, 5, 32]}
    assert tokens_from_kept_kv(document(result))[1:] == [["two-way", "4", "32", "2", "1", "32"]]
