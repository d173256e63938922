"""Which benchmarks there are, by name. Imports none of them: `kvrelay bench --help` needs no torch
and no matplotlib.

Each is a module with a function `command`, as typer takes one. What all of them share:

    def command(..., json: report.Json = None, plots: report.Plots = None) -> None:
        output = Report("serve", json, plots)    # before measuring: a missing library or a bad path must not cost an hour
        output.add(result)                       # as often as there are results
        output.print_table("Title", ["column", ...], [[cell, ...], ...])
        output.plot("serve-itl", draw)           # draws only with --plots
        output.finish()                          # writes --json
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark lies and what one line says about it."""

    module: str
    summary: str


BENCHMARKS: dict[str, Benchmark] = {
    "kv-cache": Benchmark(
        "benchmarks.kv_cache", "Generation with and without a KV cache, by our engine and by transformers."
    ),
    "attention": Benchmark(
        "benchmarks.attention", "Why KV can travel: a prefix's KV under causal and under two-way attention."
    ),
    "memory": Benchmark(
        "benchmarks.memory", "KV bytes predicted and measured; waste of contiguous buffers and of paged blocks."
    ),
    "engine": Benchmark(
        "benchmarks.engine", "Prefill and decode of the engine, beside the machine's limits in the same run."
    ),
    "variants": Benchmark(
        "benchmarks.variants", "Engines of several settings or versions in turns of a few steps: their ratios."
    ),
    "perplexity": Benchmark("benchmarks.perplexity", "Perplexity of a text in float32 and quantized."),
    "serve": Benchmark("benchmarks.serve", "Load on a cluster: TTFT, ITL, throughput, goodput."),
    "relay": Benchmark("benchmarks.relay", "Tokens per second through one gateway, with a simulated engine."),
    "routing": Benchmark(
        "benchmarks.routing", "Strategies of --routing in virtual time: cached tokens and time to first token."
    ),
    "transfer": Benchmark(
        "benchmarks.transfer", "KV transfer: GB/s, CPU time and exposed share, by transport and size."
    ),
    "tls": Benchmark("benchmarks.tls", "What TLS between all services costs, and keys."),
    "startup": Benchmark("benchmarks.startup", "From `serve all` to its first token, and its workers' memory."),
    "load-memory": Benchmark(
        "benchmarks.load_memory", "What a worker holds while it loads a model, beside its weights."
    ),
    "speculation": Benchmark("benchmarks.speculation", "Decoding with and without guesses by prompt lookup."),
    "peers": Benchmark("benchmarks.peers.comparison", "Other engines beside ours, interleaved in one run."),
}
