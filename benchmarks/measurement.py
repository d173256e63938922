"""One request's times as its client sees them. Knows nothing about clusters."""

import itertools
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.statistics import percentile
from kvrelay.client import Delta
from kvrelay.core.timeline import Phases


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times of one request in seconds: from submit to token 0, between tokens, and from submit to
    the end.
    """

    ttft_s: float
    itl_s: tuple[float, ...]
    total_s: float

    @property
    def num_tokens(self) -> int:
        return 1 + len(self.itl_s)

    @property
    def tpot_s(self) -> float:
        """(last - first) / (n - 1); 0 for a single token."""
        return fmean(self.itl_s) if self.itl_s else 0.0

    @property
    def itl_s_p99(self) -> float:
        """99 of 100 gaps of this request are no longer; 0 for a single token."""
        return percentile(self.itl_s, 99) if self.itl_s else 0.0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request of a load: what was measured of it, or why there is nothing."""

    kind: str
    num_prompt_tokens: int
    submit_s: float
    """From the load's begin."""
    measurement: Measurement | None
    phases: Phases | None
    error: str | None = None


async def measure(stream: AsyncIterable[Delta], clock_s: Callable[[], float]) -> Measurement:
    """Reads a stream to its end. Tokens that come in one message get its time, so between them is
    0.
    """
    begin_s = clock_s()
    token_times_s: list[float] = []
    async for delta in stream:
        token_times_s += [clock_s()] * len(delta.tokens)
    end_s = clock_s()
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(token_times_s))
    return Measurement(token_times_s[0] - begin_s, gaps_s, end_s - begin_s)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to count as good, in milliseconds; None does not matter. `itl_ms` is
    of 99 of its 100 gaps.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def given(self) -> bool:
        return (self.ttft_ms, self.itl_ms, self.tpot_ms) != (None, None, None)

    def is_met_by(self, record: RequestRecord) -> bool:
        """A request that failed meets none."""
        measured = record.measurement
        if measured is None:
            return False
        values_s = (measured.ttft_s, measured.itl_s_p99, measured.tpot_s)
        bounds_ms = (self.ttft_ms, self.itl_ms, self.tpot_ms)
        return all(bound is None or 1000 * value <= bound for value, bound in zip(values_s, bounds_ms, strict=True))


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of times in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def distribution(values_s: Sequence[float]) -> Distribution | None:
    """Of seconds; None where there are none."""
    if not values_s:
        return None
    values_ms = [1000 * value for value in values_s]
    p50, p90, p99 = (percentile(values_ms, percent) for percent in (50, 90, 99))
    return Distribution(fmean(values_ms), p50, p90, p99, max(values_ms))


@dataclass(frozen=True, slots=True)
class Summary:
    """A load, or the requests of one kind in it."""

    num_requests: int
    num_failed: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    requests_per_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    handoff_gap_ms: Distribution | None
    """Token 0 to token 1 of the requests whose prompt a prefill worker computed."""
    handoff_gap_ratio: float | None
    """Its median over that of `itl_ms`."""
    good_share: float
    """Of the requests, those that met the objective."""
    goodput_requests_per_s: float
    """As `goodput_of` counts it."""
    phase_means_ms: dict[str, float]
    errors: tuple[str, ...]


def summarize(
    records: Sequence[RequestRecord], wall_s: float, objective: Objective, offered_requests_per_s: float | None = None
) -> Summary:
    """At least one request is needed."""
    measured = [record.measurement for record in records if record.measurement is not None]
    num_tokens = sum(each.num_tokens for each in measured)
    itl_ms = distribution([gap for each in measured for gap in each.itl_s])
    handoff_gap_ms = distribution(_handoff_gaps_s(records))
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(measured),
        num_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=num_tokens / wall_s,
        requests_per_s=len(measured) / wall_s,
        ttft_ms=distribution([each.ttft_s for each in measured]),
        itl_ms=itl_ms,
        tpot_ms=distribution([each.tpot_s for each in measured if each.itl_s]),
        handoff_gap_ms=handoff_gap_ms,
        handoff_gap_ratio=handoff_gap_ms.p50 / itl_ms.p50 if handoff_gap_ms and itl_ms and itl_ms.p50 else None,
        good_share=sum(map(objective.is_met_by, records)) / len(records),
        goodput_requests_per_s=goodput_of(records, wall_s, objective, offered_requests_per_s),
        phase_means_ms=phase_means([record.phases for record in records if record.phases is not None]),
        errors=tuple(sorted({record.error for record in records if record.error is not None})),
    )


def goodput_of(
    records: Sequence[RequestRecord], wall_s: float, objective: Objective, offered_requests_per_s: float | None
) -> float:
    """Good requests per second: in an open loop the offered rate times their share, in a closed one
    their number over time.
    """
    num_good = sum(map(objective.is_met_by, records))
    return offered_requests_per_s * num_good / len(records) if offered_requests_per_s else num_good / wall_s


def _handoff_gaps_s(records: Sequence[RequestRecord]) -> list[float]:
    """The first gap of each request that was handed from one worker to another."""
    return [
        record.measurement.itl_s[0]
        for record in records
        if record.measurement is not None
        and record.measurement.itl_s
        and record.phases is not None
        and not record.phases.prefilled_on_decode_worker
    ]


def phase_means(phases: Sequence[Phases]) -> dict[str, float]:
    """Means of all that is in milliseconds, and the share of prompts that the decode worker
    computed.
    """
    if not phases:
        return {}
    names = [name for name in Phases.__slots__ if name.endswith("_ms")]
    means = {name: fmean(getattr(each, name) for each in phases) for name in names}
    return means | {"prefilled_on_decode_worker": fmean(each.prefilled_on_decode_worker for each in phases)}
