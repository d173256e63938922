"""Placement by prediction, against always here and always there, in virtual time.

A time counts until the first token is there and the sequence can be decoded.
"""

from dataclasses import replace
from random import Random

import pytest

from tests.support.placement_simulation import Link, Place, PlacementSimulation, Speed, arrivals

SLOW, FAST = Speed(600), Speed(6000)
GOOD_LINK, SLOW_LINK = Link(100_000), Link(150)
SHORT, LONG = (8, 100), (500, 2000)
NUM_REQUESTS = 160
NUM_FIRST = 40
"""Which find out the rates."""

PLACES: dict[str, Place] = {
    "predicted": lambda on_decode, on_prefill: on_decode < on_prefill,
    "local": lambda *_: True,
    "remote": lambda *_: False,
}
MIXES = [
    pytest.param(SLOW, FAST, GOOD_LINK, 0.5, id="prefill worker ten times as fast"),
    pytest.param(FAST, SLOW, GOOD_LINK, 0.5, id="decode worker ten times as fast"),
    pytest.param(FAST, FAST, GOOD_LINK, 0.3, id="equal"),
    pytest.param(SLOW, SLOW, GOOD_LINK, 4.0, id="equal and slow"),
    pytest.param(FAST, FAST, SLOW_LINK, 1.0, id="slow link"),
    pytest.param(SLOW, FAST, SLOW_LINK, 4.0, id="fast prefill worker behind a slow link"),
]


def means(
    decode: Speed, prefill: Speed, link: Link, gap_s: float, lengths: tuple[tuple[int, int], ...]
) -> dict[str, float]:
    requests = list(arrivals(Random(7), NUM_REQUESTS, gap_s, lengths))
    return {
        name: PlacementSimulation(decode, prefill, link, place, seed=1).run(requests).mean_s(NUM_FIRST)
        for name, place in PLACES.items()
    }


@pytest.mark.parametrize("lengths", [(SHORT,), (LONG,), (SHORT, LONG)], ids=["short", "long", "mixed"])
@pytest.mark.parametrize(("decode", "prefill", "link", "gap_s"), MIXES)
def test_prediction_is_as_good_as_the_better_of_both(
    decode: Speed, prefill: Speed, link: Link, gap_s: float, lengths: tuple[tuple[int, int], ...]
) -> None:
    mean_s = means(decode, prefill, link, gap_s, lengths)
    assert mean_s["predicted"] <= 1.03 * min(mean_s["local"], mean_s["remote"])


@pytest.mark.parametrize(("decode", "prefill", "link", "gap_s"), MIXES[2:4])
def test_between_equal_workers_it_is_better_than_either(
    decode: Speed, prefill: Speed, link: Link, gap_s: float
) -> None:
    mean_s = means(decode, prefill, link, gap_s, (SHORT, LONG))
    assert mean_s["predicted"] <= 0.9 * min(mean_s["local"], mean_s["remote"])


@pytest.mark.parametrize(("decode", "prefill", "link", "gap_s"), MIXES)
def test_noise_and_steps_that_hang_cost_little(decode: Speed, prefill: Speed, link: Link, gap_s: float) -> None:
    noisy = replace(decode, noise=0.3), replace(prefill, noise=0.3)
    mean_s = means(*noisy, link, gap_s, (SHORT, LONG))
    assert mean_s["predicted"] <= 1.1 * min(mean_s["local"], mean_s["remote"])
