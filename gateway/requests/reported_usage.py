"""What gateways tell each other about keys. Pure.

gauges    running requests, waiting tokens, ...    added up
totals    output tokens, response formats          increases come off the own budget
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvrelay.errors import UnreadableStateError

MAX_REPORTED_KEYS = 1024
MAX_COUNT = 2**53


@dataclass(frozen=True, slots=True)
class ReportedUsage:
    num_running: int = 0
    num_queued_tokens: int = 0
    num_unattended: int = 0
    stored_bytes: int = 0
    num_output_tokens: int = 0
    num_formats: int = 0
    missing_output_tokens: int = 0
    """In the budget of a minute."""
    missing_formats: int = 0

    def __add__(self, other: "ReportedUsage") -> "ReportedUsage":
        return ReportedUsage(*map(sum, zip(_counts(self), _counts(other), strict=True)))


Report = Mapping[str, ReportedUsage]
"""By the key's digest."""


def digest_of_key(key_id: str) -> str:
    return hashlib.blake2b(key_id.encode(), digest_size=16).hexdigest()


def encode_report(report: Report) -> bytes:
    kept = sorted(report.items(), key=lambda item: item[1].num_running, reverse=True)[:MAX_REPORTED_KEYS]
    return json.dumps({digest: _counts(usage) for digest, usage in kept}, separators=(",", ":")).encode()


def decode_report(data: bytes) -> Report:
    """Raises UnreadableStateError."""
    try:
        return {str(digest): _usage(counts) for digest, counts in dict(json.loads(data)).items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableStateError("another gateway's report of its keys' usage cannot be read; update it") from error


class UsageElsewhere:
    def __init__(self) -> None:
        self._reports: Mapping[str, Report] = {}

    def update(self, reports: Mapping[str, Report]) -> dict[str, ReportedUsage]:
        """Returns by how much totals have grown, but for gateways that are new here."""
        grown: dict[str, ReportedUsage] = {}
        for gateway_id, report in reports.items():
            before = self._reports.get(gateway_id)
            if before is None:
                continue
            for digest, usage in report.items():
                more = _growth(before.get(digest, ReportedUsage()), usage)
                grown[digest] = grown.get(digest, ReportedUsage()) + more
        self._reports = reports
        return grown

    def of(self, digest: str) -> ReportedUsage:
        return sum(self._usages(digest), ReportedUsage())

    def missing(self, digest: str) -> tuple[int, int]:
        """What budgets that begin now lack."""
        usages = list(self._usages(digest))
        return (
            max((usage.missing_output_tokens for usage in usages), default=0),
            max((usage.missing_formats for usage in usages), default=0),
        )

    def _usages(self, digest: str) -> Iterable[ReportedUsage]:
        return (report[digest] for report in self._reports.values() if digest in report)


def _growth(before: ReportedUsage, after: ReportedUsage) -> ReportedUsage:
    return ReportedUsage(
        num_output_tokens=_grown(before.num_output_tokens, after.num_output_tokens),
        num_formats=_grown(before.num_formats, after.num_formats),
    )


def _grown(before: int, after: int) -> int:
    # a smaller total began anew
    return after - before if after >= before else after


def _counts(usage: ReportedUsage) -> tuple[int, ...]:
    return dataclasses.astuple(usage)


def _usage(counts: object) -> ReportedUsage:
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        raise ValueError("counts are whole numbers")
    return ReportedUsage(*counts)
