"""`bench relay` end to end, small: what a simulated worker sends arrives, through a real gateway,
in order and counted.
"""

import os
from pathlib import Path

import pytest

from benchmarks.relay import _highest, _is_kept_up_with
from benchmarks.relay_measurement import RelayBench, RelayLoad, RelayResult
from kvrelay.models.store import ModelStore, default_model_dir


@pytest.mark.real_model
@pytest.mark.integration
async def test_tokens_of_several_workers_arrive_and_are_counted() -> None:
    folder = Path(ModelStore(default_model_dir(os.environ)).ensure_demo_model())
    async with RelayBench.running(folder, num_workers=2) as bench:
        paced = await bench.measure(RelayLoad(num_streams=6, tokens_per_s=600.0, num_tokens=180))
        flood = await bench.measure(RelayLoad(num_streams=6, tokens_per_s=None, num_tokens=600, coalesce_ms=50))
    assert paced.num_tokens == 6 * (180 // 6 - 1), "token 0 is the prefill's"
    assert flood.num_tokens == 6 * (600 // 6 - 1)
    assert flood.tokens_per_message > 2
    assert 0 < paced.latency_ms_p50 <= paced.latency_ms_p99 <= paced.latency_ms_max


def result(**changes: float) -> RelayResult:
    values: dict[str, float] = dict.fromkeys(RelayResult.__slots__, 1.0)
    return RelayResult(**(values | {"offered_tokens_per_s": 1000.0, "tokens_per_s": 990.0, "coalesce_ms": 0} | changes))  # type: ignore[arg-type]


def test_a_rate_counts_when_it_is_delivered_in_time_and_token_by_token() -> None:
    assert _is_kept_up_with(result())
    assert not _is_kept_up_with(result(tokens_per_s=900.0))
    assert not _is_kept_up_with(result(last_latency_ms=500.0))
    assert not _is_kept_up_with(result(tokens_per_message=2.0))
    assert _is_kept_up_with(result(tokens_per_message=2.0, coalesce_ms=50))


async def test_the_highest_rate_is_found_from_above_though_one_try_fails() -> None:
    tried: list[float] = []

    async def measure(rate: float) -> RelayResult:
        tried.append(rate)
        delivered = min(rate, 5000.0) if len(tried) != 4 else 0.9 * rate
        return result(offered_tokens_per_s=rate, tokens_per_s=delivered)

    highest = await _highest(measure, 10_000.0)
    assert highest is not None
    assert highest.offered_tokens_per_s is not None
    assert 4500 < highest.offered_tokens_per_s <= 5000 / 0.97
    assert tried[3] == tried[4], "the near miss was tried again"
