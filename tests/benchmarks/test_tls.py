"""`bench tls`: turns, ratios and goals; and that what it calls TLS is TLS."""

import asyncio
import os
from pathlib import Path

import pytest

from benchmarks.bench_credentials import BenchCredentials
from benchmarks.http2_streams import BrokenConnectionError
from benchmarks.relay_client import StreamPlan, run_streams
from benchmarks.relay_measurement import RelayBench, RelayLoad
from benchmarks.tls_measurement import (
    ENCRYPTED,
    ONE_STREAM,
    PLAIN,
    PUSH_CPU,
    PUSH_RATE,
    RELAY_CPU,
    Measure,
    Side,
    Values,
    all_cores,
    compare,
    push,
)
from kvrelay.core.model_spec import KVLayout
from kvrelay.models.store import ModelStore, default_model_dir


async def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    done: list[tuple[int, str]] = []

    def side(name: str, figures: list[float]) -> Side:
        async def measure(number: int) -> Values:
            done.append((number, name))
            return {ONE_STREAM: figures[number]}

        return measure

    sides = {PLAIN: side(PLAIN, [1.0, 10.0, 20.0, 40.0]), ENCRYPTED: side(ENCRYPTED, [9.0, 9.0, 19.0, 20.0])}
    (found,) = await compare(sides, 3, lambda number: None)
    assert (found.plain, found.encrypted) == ((10.0, 20.0, 40.0), (9.0, 19.0, 20.0))
    assert (found.ratio.min, found.ratio.median, found.ratio.max) == (0.5, 0.9, 0.95)
    assert found.is_kept
    assert [name for _, name in done] == [ENCRYPTED, PLAIN, PLAIN, ENCRYPTED, ENCRYPTED, PLAIN, PLAIN, ENCRYPTED]


@pytest.mark.parametrize(
    ("measure", "ratio", "is_kept"),
    [
        (ONE_STREAM, 0.89, False),
        (ONE_STREAM, 1.2, True),
        (RELAY_CPU, 1.16, False),
        (RELAY_CPU, 0.8, True),
        (PUSH_RATE, 0.1, None),
    ],
)
def test_a_goal_bounds_the_ratio_on_its_side(measure: Measure, ratio: float, is_kept: bool | None) -> None:
    assert measure.is_kept_by(ratio) is is_kept


@pytest.mark.integration
async def test_kv_is_pushed_over_tls(tmp_path: Path) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32")
    async with push(layout, 32, BenchCredentials.made_in(tmp_path / "certificates")) as measure:
        values = await measure(1)
    assert values[PUSH_RATE] > 0
    assert values[PUSH_CPU] >= 0


@pytest.mark.real_model
@pytest.mark.integration
async def test_a_gateway_relays_over_tls_and_only_to_those_with_a_key(tmp_path: Path) -> None:
    folder = Path(ModelStore(default_model_dir(os.environ)).ensure_demo_model())
    credentials = BenchCredentials.made_in(tmp_path / "certificates")
    async with RelayBench.running(folder, credentials=credentials, cores=all_cores()) as bench:
        result = await bench.measure(RelayLoad(num_streams=4, tokens_per_s=400.0, num_tokens=80))
        plan = StreamPlan(bench._cluster.gateway_address, 1, 2, 0, 20.0, frozenset(os.sched_getaffinity(0)))
        with pytest.raises(BrokenConnectionError):
            await asyncio.to_thread(run_streams, plan)
    assert result.num_tokens == 4 * (80 // 4 - 1), "token 0 is the prefill's"
