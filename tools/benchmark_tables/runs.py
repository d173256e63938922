"""Tables of benchmarks of one part: transfer, start, gateway, kernels, quality, memory."""

from typing import Any

from benchmarks.statistics import Spread, spread
from tools.benchmark_tables.documents import Document, Rows, table, verdict

TRANSPORTS = {"grpc": "gRPC", "shared-memory": "shared memory"}


@table("transfer")
def transfer(document: Document) -> Rows:
    cases = {
        (each["case"]["transport"], each["case"]["num_tokens"], each["case"]["mode"]): each
        for each in document.results
        if "case" in each
    }
    rows = []
    for transport, title in TRANSPORTS.items():
        for num_tokens in sorted({key[1] for key in cases}):
            raw, paced = (cases[transport, num_tokens, mode] for mode in ("raw", "paced"))
            rows.append(
                [
                    title,
                    f"{num_tokens:,}",
                    Spread(**raw["gb_per_s"]).text(2),
                    Spread(**raw["cpu_s_per_gb"]).text(2),
                    Spread(**paced["exposed_share"]).text(2, 100),
                    Spread(**paced["handoff_ms"]).text(1),
                ]
            )
    rows += [
        [f"copies alone, {each['num_copies']} for {TRANSPORTS[each['bound_of']]}", "", f"{each['gb_per_s']:.2f}"]
        + [""] * 3
        for each in document.results
        if "bound_of" in each
    ]
    titles = ["transport", "tokens", "GB/s", "CPU s per GB", "exposed, % of TTFT", "token 0 to runnable, ms"]
    return [titles, *rows]


@table("transfer")
def transfer_goals(document: Document) -> Rows:
    rows = []
    for transport, goal in (("grpc", 1), ("shared-memory", 3)):
        cases = [each for each in document.results if each.get("case", {}).get("transport") == transport]
        rate = max(each["gb_per_s"]["median"] for each in cases if each["case"]["mode"] == "raw")
        share = 100 * max(each["exposed_share"]["median"] for each in cases if each["case"]["mode"] == "paced")
        title = TRANSPORTS[transport]
        rows += [
            [f"{title}, highest median rate, GB/s", f"≥ {goal}", f"{rate:.2f}", verdict(rate, goal)],
            [f"{title}, most exposed, % of TTFT", "≤ 5", f"{share:.2f}", verdict(share, 5, at_least=False)],
        ]
    return [["", "goal", "reached", ""], *rows]


@table("startup")
def startup(document: Document) -> Rows:
    starts = [result["start"] for result in document.results]
    first = spread([start["first_token_s"] for start in starts])
    rows = [["first token after `serve all`, s", first.text(2), f"≤ 10: {verdict(first.median, 10, at_least=False)}"]]
    for process in ("prefill-0", "decode-0"):
        shares = [_memory_share(result, process) for result in document.results]
        share = spread(shares)
        what = f"memory of {process} ÷ (1.3 × weights + KV pool + 500 MB)"
        rows.append([what, share.text(2), f"≤ 1: {verdict(share.median, 1, at_least=False)}"])
    return [["", "measured", "goal"], *rows]


def _memory_share(result: dict[str, Any], process: str) -> float:
    """The peak, or what it holds and all of its pool if that is more."""
    (use,) = (each for each in result["start"]["processes"] if each["process"] == process)
    full_bytes = max(use["peak_rss_bytes"], use["rss_bytes"] + result["start"]["kv_pool_bytes"])
    return float(full_bytes / result["bound_bytes"])


@table("load-memory")
def load_memory(document: Document) -> Rows:
    rows = []
    for each in document.results:
        load = each["load"]
        sizes = [each["stored_bytes"], load["weight_bytes"], load["peak_bytes"], load["held_bytes"]]
        stored, weights, peak, held = (f"{size / 2**20:,.0f}" for size in sizes)
        rows.append([each["model"], each["served"], stored, weights, peak, f"{sizes[2] / sizes[1]:.2f}", held])
    titles = [
        "model",
        "served in",
        "files, MiB",
        "weights, MiB",
        "peak, MiB",
        "peak ÷ weights",
        "held when loaded, MiB",
    ]
    return [titles, *rows]


@table("relay")
def gateway(document: Document) -> Rows:
    rows = []
    for entry in document.results:
        result = entry["result"]
        row = [_load_title(entry), f"{result['tokens_per_s']:,.0f}", f"{result['tokens_per_message']:.1f}"]
        row.append(f"{result['gateway_cores']:.2f}")
        row.append(f"{result['gateway_cpu_s_per_1000_tokens'] * 1000:.0f}")
        rows.append([*row, *(f"{result[f'latency_ms_{part}']:,.1f}" for part in ("p50", "p99", "max"))])
    titles = ["load", "tokens/s", "tokens per message", "cores of the gateway", "CPU µs per token"]
    return [[*titles, "added p50, ms", "p99, ms", "max, ms"], *rows]


@table("relay")
def gateway_goals(document: Document) -> Rows:
    results = {entry["load"]: entry["result"] for entry in document.results}
    cores, p99 = results["given"]["gateway_cores"], results["half"]["latency_ms_p99"]
    return [
        ["", "goal", "reached", ""],
        ["cores for 5,000 tokens/s, a message each", "≤ 1", f"{cores:.2f}", verdict(cores, 1, at_least=False)],
        ["added at half of that, p99, ms", "≤ 3", f"{p99:.1f}", verdict(p99, 3, at_least=False)],
    ]


def _load_title(entry: dict[str, Any]) -> str:
    offered = entry["result"]["offered_tokens_per_s"]
    rate = "as fast as it goes" if offered is None else f"{offered:,.0f} tokens/s"
    return f"bare grpc.aio server, {rate}" if entry["load"].startswith("floor") else rate


@table("engine")
def engine_steps(document: Document) -> Rows:
    rows = [
        [
            _case(case),
            Spread(**case["seconds"]).text(1, 1000),
            f"{case['percent_of_bound']:.0f}",
            f"{case['gb_per_s']:.1f}",
            f"{case['gflop_per_s']:.0f}",
            f"{case['percent_outside_kernels']:.1f}",
        ]
        for case in document.results
        if "phase" in case
    ]
    limit = next(case for case in document.results if "limit_bytes_per_s" in case)
    reads = Spread(**limit["limit_bytes_per_s"]).text(1, 1e-9)
    multiplies = Spread(**limit["limit_operations_per_s"]).text(0, 1e-9)
    rows.append(["what the core can do", "", "", reads, multiplies, ""])
    return [["", "ms", "% of the bound", "GB/s", "GFLOP/s", "% outside of the kernels (goal ≤ 10)"], *rows]


@table("variants-int8")
def int8_steps(document: Document) -> Rows:
    rows = []
    for case in document.results:
        if case.get("variant") == "int8":
            low, high = case["ratio_quartiles"]
            times = f"{1 / case['ratio']['median']:.2f} ({1 / high:.2f} to {1 / low:.2f})"
            f32 = next(each for each in document.results if _is_same_case(each, case) and each["variant"] == "none")
            both = (Spread(**each["seconds"]).text(1, 1000) for each in (f32, case))
            goal = f"≥ 2.5: {verdict(1 / case['ratio']['median'], 2.5)}" if case["batch_size"] == 16 else ""
            rows.append([_case(case), *both, times, goal])
    return [["", "f32, ms", "int8, ms", "times as fast (quartiles)", "goal"], *rows]


@table("perplexity")
def perplexity(document: Document) -> Rows:
    rows = []
    for each in document.results:
        if "perplexity" in each:
            more = [100 * (value - 1) for value in each["window_ratios"]]
            share = f"{100 * (each['ratio'] - 1):.2f} ({min(more):.1f} to {max(more):.1f})"
            name = "f32" if each["quantize"] == "none" else each["quantize"]
            goal = "" if name == "f32" else f"≤ 3 %: {verdict(each['ratio'], 1.03, at_least=False)}"
            rows.append([name, f"{each['perplexity']:.3f}", share, f"{each['percent_same_choice']:.1f}", goal])
    return [["weights", "perplexity", "% more (of a window)", "% same next token", "goal"], *rows]


@table("memory")
def kv_waste(document: Document) -> Rows:
    wastes = [each for each in document.results if each["kind"] == "waste"]
    rows = [
        [
            each["strategy"],
            f"{each['mean_bytes'] / 2**20:,.0f}",
            f"{each['peak_bytes'] / 2**20:,.0f}",
            f"{each['waste_percent']:.1f}",
            f"{each['copied_bytes'] / 2**20:,.0f}",
            f"{wastes[0]['mean_bytes'] / each['mean_bytes']:.1f}",
        ]
        for each in wastes
    ]
    return [["strategy", "mean, MiB", "peak, MiB", "% empty", "copied, MiB", "sequences in the same memory"], *rows]


def _is_same_case(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("phase", "num_tokens", "batch_size", "chunk_tokens"))


def _case(case: dict[str, Any]) -> str:
    if case["phase"] == "decode":
        return f"decode, {case['batch_size']} × {case['num_tokens']:,} tokens"
    return f"prompt of {case['num_tokens']:,}, chunks of {case['chunk_tokens']:,}"
