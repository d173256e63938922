"""One request's times as its client sees them, and the summary of many. Knows nothing about clusters."""

import itertools
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.statistics import percentile
from kvrelay.client import Delta


@dataclass(frozen=True, slots=True)
class Measurement:
    """Times of one request in seconds: from submit to token 0, between tokens, and from submit to the end."""

    ttft_s: float
    itl_s: tuple[float, ...]
    total_s: float

    @property
    def num_tokens(self) -> int:
        return 1 + len(self.itl_s)


async def measure(stream: AsyncIterable[Delta], clock_s: Callable[[], float]) -> Measurement:
    """Reads a stream to its end. Tokens that come in one message get its time, so between them is 0."""
    begin_s = clock_s()
    token_times_s: list[float] = []
    async for delta in stream:
        token_times_s += [clock_s()] * len(delta.tokens)
    end_s = clock_s()
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(token_times_s))
    return Measurement(token_times_s[0] - begin_s, gaps_s, end_s - begin_s)


@dataclass(frozen=True, slots=True)
class Summary:
    """All requests of a run. Times in milliseconds; `tpot_ms_mean` is (end - first) / (n - 1) per request, averaged."""

    num_requests: int
    num_tokens: int
    wall_s: float
    tokens_per_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    tpot_ms_mean: float

    def rows(self) -> list[tuple[str, str]]:
        return [(name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}") for name, value in asdict(self).items()]


def summarize(measurements: Sequence[Measurement], wall_s: float) -> Summary:
    """At least one request is needed."""
    num_tokens = sum(each.num_tokens for each in measurements)
    gaps_s = [gap for each in measurements for gap in each.itl_s] or [0.0]
    tpots_s = [sum(each.itl_s) / len(each.itl_s) for each in measurements if each.itl_s] or [0.0]
    ttfts_s = [each.ttft_s for each in measurements]
    return Summary(
        num_requests=len(measurements),
        num_tokens=num_tokens,
        wall_s=wall_s,
        tokens_per_s=num_tokens / wall_s,
        ttft_ms_p50=1000 * percentile(ttfts_s, 50),
        ttft_ms_p99=1000 * percentile(ttfts_s, 99),
        itl_ms_p50=1000 * percentile(gaps_s, 50),
        itl_ms_p99=1000 * percentile(gaps_s, 99),
        tpot_ms_mean=1000 * sum(tpots_s) / len(tpots_s),
    )
