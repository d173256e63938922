"""The one table of docs/benchmarks/index.md: every workload, and each product that did it.

The best of a workload is bold, among f32 and among 8 bits, so that losses show.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.statistics import Spread, spread
from tools.benchmark_tables.documents import TABLES, Document, markdown_table, read
from tools.benchmark_tables.peers import measured
from tools.benchmark_tables.runs import TRANSPORTS


@dataclass(frozen=True, slots=True)
class Workload:
    """What was done, by whom, and how well.

    Attributes:
        page: of the folder, with the whole command.
        cells: by product, the median with the range, and the value by which the best is found.
        is_f32: by product; f32 is compared with f32 only. Empty: all are compared.
    """

    title: str
    document: Document
    page: str
    cells: dict[str, tuple[str, float]]
    is_more_better: bool
    is_f32: Mapping[str, bool] = field(default_factory=dict)

    def best(self) -> set[str]:
        """The best product of those that are compared, where there are several."""
        kinds: dict[bool, list[str]] = {}
        for product in self.cells:
            kinds.setdefault(self.is_f32.get(product, True), []).append(product)
        choose = max if self.is_more_better else min
        found = set()
        for products in kinds.values():
            best = choose(self.cells[each][1] for each in products)
            found |= {each for each in products if self.cells[each][1] == best and len(products) > 1}
        return found


def overview() -> str:
    """As Markdown."""
    rows = [["workload", "product", "median (least to most)", "date", "command", "machine"]]
    for workload in workloads():
        best, document = workload.best(), workload.document
        command = f"[`{' '.join(document.command.split()[:3])}`]({workload.page})"
        for product, (text, _) in workload.cells.items():
            shown = f"**{text}**" if product in best else text
            rows.append([workload.title, product, shown, document.date, command, document.machine])
    return markdown_table(rows)


def workloads() -> Iterator[Workload]:
    yield from _peers()
    yield from _goodput()
    yield _transfer()
    yield _handoff()
    yield from _gateway()
    yield _startup()
    yield _perplexity()


PEER_WORKLOADS = (
    ("decode of one stream, tok/s", "peers-2-threads", "w1", "tokens_per_s", 1),
    ("first token of 2,048, s", "peers-2-threads", "ttft-2048", "ttft_s", 2),
    ("16 requests at once, tok/s", "peers-2-threads", "w2", "tokens_per_s", 0),
    ("mean first token of 16 at once, s", "peers-2-threads", "w2", "ttft_s", 2),
    ("decode of one stream, again, tok/s", "peers-16-at-once", "w1", "tokens_per_s", 1),
    ("16 requests at once, again, tok/s", "peers-16-at-once", "w2", "tokens_per_s", 0),
    ("mean first token of 16 at once, again, s", "peers-16-at-once", "w2", "ttft_s", 2),
    ("decode of one stream, one thread, tok/s", "peers-1-thread", "w1", "tokens_per_s", 1),
    ("4 streams beside long prompts, p99 of ITL, ms", "peers-long-prompts", "w3", "itl_p99_ms", 0),
    ("first token of those long prompts, s", "peers-long-prompts", "w3", "long_ttft_s", 1),
)


def _peers() -> Iterator[Workload]:
    for title, name, run, measure, decimals in PEER_WORKLOADS:
        found = measured(read(name), run, measure).values()
        cells = {each.title: (each.spread.text(decimals), each.spread.median) for each in found}
        is_f32 = {each.title: each.weights == "f32" for each in found}
        page = "streams.md" if run == "w3" else "engines.md"
        yield Workload(title, read(name), page, cells, measure == "tokens_per_s", is_f32)


def _goodput() -> Iterator[Workload]:
    for title, name in (("128->64", "goodput-short-prompts"), ("2048->64", "goodput-long-prompts")):
        document = read(name)
        (compared,) = (result["comparison"] for result in document.results if "comparison" in result)
        cells = {}
        for kind in ("disaggregated", "colocated"):
            rates: dict[str, list[float]] = {}
            for result in document.results:
                if result.get("cluster") == compared[kind] and result["round"] > 0:
                    rates.setdefault(result["load"], []).append(result["summary"]["goodput_requests_per_s"])
            best = max((spread(values) for values in rates.values()), key=lambda each: each.median)
            cells[f"kvrelay, {compared[kind]}"] = (best.text(2), best.median)
        yield Workload(f"goodput of {title} at the best rate, good requests/s", document, "streams.md", cells, True)


def _transfer() -> Workload:
    document = read("transfer")
    cells = {}
    for result in document.results:
        case = result.get("case", {})
        if case.get("mode") == "raw" and case["num_tokens"] == 2048:
            found = Spread(**result["gb_per_s"])
            cells[f"kvrelay, {TRANSPORTS[case['transport']]}"] = (found.text(2), found.median)
    return Workload("KV of 2,048 tokens between processes, GB/s", document, "transfer.md", cells, True)


def _handoff() -> Workload:
    gap = read("handoff").results[0]["summary"]["handoff_gap_ms"]
    text = f"{gap['p50']:.1f} (at most {gap['max']:.1f})"
    return Workload("handoff gap, ms", read("handoff"), "transfer.md", {"kvrelay": (text, gap["p50"])}, False)


def _gateway() -> Iterator[Workload]:
    document = read("relay")
    results = {entry["load"]: entry["result"] for entry in document.results}
    flood = results["flood"]["tokens_per_s"]
    title = "64 streams through one gateway, tokens/s"
    yield Workload(title, document, "gateway-overhead.md", {"kvrelay": (f"{flood:,.0f}", flood)}, True)
    for load, rate in (("given", "5,000"), ("half", "2,500")):
        cells = {
            product: (f"{results[name]['latency_ms_p99']:.1f}", results[name]["latency_ms_p99"])
            for product, name in (("kvrelay", load), ("bare grpc.aio server", f"floor of {load}"))
        }
        yield Workload(f"added at {rate} tokens/s, p99, ms", document, "gateway-overhead.md", cells, False)


def _startup() -> Workload:
    found = spread([result["start"]["first_token_s"] for result in read("startup").results])
    cells = {"kvrelay": (found.text(2), found.median)}
    return Workload("start to first token, s", read("startup"), "startup-and-memory.md", cells, False)


def _perplexity() -> Workload:
    cells = {}
    for result in read("perplexity").results:
        if "perplexity" in result:
            name = "f32" if result["quantize"] == "none" else result["quantize"]
            cells[f"kvrelay, {name}"] = (f"{result['perplexity']:.3f}", result["perplexity"])
    return Workload("perplexity of licences and sources", read("perplexity"), "quality.md", cells, False)


TABLES["overview"] = overview
