"""Table of `kvrelay bench tls`: the same work in plain text and encrypted."""

from benchmarks.statistics import Spread, spread
from tools.benchmark_tables.documents import Document, Rows, table, verdict


@table("tls")
def tls_cost(document: Document) -> Rows:
    rows = []
    for result in document.results:
        measure, ratio = result["measure"], Spread(**result["ratio"])
        sides = (spread(result[side]).text(measure["decimals"]) for side in ("plain", "encrypted"))
        rows.append([", ".join(filter(None, (measure["name"], measure["unit"]))), *sides, ratio.text(3), _goal(result)])
    return [["", "plain", "TLS", "TLS ÷ plain", "goal"], *rows]


def _goal(result: dict[str, dict[str, float | None]]) -> str:
    ratio, measure = result["ratio"]["median"], result["measure"]
    least, most = measure["least_ratio"], measure["most_ratio"]
    assert ratio is not None, "a median"
    if least is not None:
        return f"≥ {least:g}: {verdict(ratio, least)}"
    return "" if most is None else f"≤ {most:g}: {verdict(ratio, most, at_least=False)}"
