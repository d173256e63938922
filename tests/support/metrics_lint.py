"""Finds the faults that `promtool check metrics` finds in Prometheus' text format."""

import re
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_ENDS = ("_bucket", "_count", "_sum", "_info")
RESERVED_LABELS = {"le", "quantile", "instance", "job"}
TYPES = ("counter", "gauge", "histogram", "summary")
OTHER_UNITS = {
    *("milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "ms", "us", "ns"),
    *("kilobytes", "megabytes", "gigabytes", "kib", "mib", "gib", "kb", "mb", "gb", "bits"),
    *("percent", "percentage"),
}


def problems(page: str, namespace: str) -> list[str]:
    """One sentence per fault. Every name begins with `namespace`, in which colons are allowed."""
    return [f"{name}: {problem}" for name, problem in _problems(page, namespace)]


def _problems(page: str, namespace: str) -> Iterator[tuple[str, str]]:
    told = re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE)
    yield from ((name, "is told twice") for name, _ in told if sum(other == name for other, _ in told) > 1)
    kinds = dict(told)
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", page, re.MULTILINE))
    for name, kind in kinds.items():
        if not name.startswith(namespace):
            continue
        if not helps.get(name, "").strip():
            yield name, "has no help"
        yield from ((name, problem) for problem in _problems_of_name(name.removeprefix(namespace), kind))
    for family in text_string_to_metric_families(page):
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        if len(series) != len(set(series)):
            yield family.name, "has a series twice"
        if family.name.startswith(namespace):
            labels = {label for sample in family.samples for label in sample.labels}
            yield from ((family.name, f"label {label} is badly named") for label in labels if not NAME.fullmatch(label))
            reserved = RESERVED_LABELS - ({"le"} if family.type == "histogram" else set())
            yield from ((family.name, f"label {label} is reserved") for label in labels & reserved)
            if not family.samples:
                yield family.name, "has no samples"


def _problems_of_name(name: str, kind: str) -> Iterator[str]:
    words = name.split("_")
    if not NAME.fullmatch(name):
        yield "is not in lower case with underscores"
    if kind not in TYPES:
        yield f"has no type that is known: {kind}"
    if (kind == "counter") != name.endswith("_total"):
        yield "ends with _total and is no counter, or the other way round"
    if name.endswith(RESERVED_ENDS) and not (name.endswith("_info") and kind == "gauge"):
        yield "ends as parts of histograms do"
    if set(words) & set(TYPES):
        yield "has its type in its name"
    if set(words) & OTHER_UNITS:
        yield "is not in base units"
