"""What the benchmark computes from the times that a client sees."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from benchmarks.measurement import Measurement, Objective, RequestRecord, measure, summarize
from kvrelay.client import Delta
from kvrelay.core.job import Token
from kvrelay.core.timeline import Phases


def tokens(num_tokens: int) -> tuple[Token, ...]:
    return tuple(Token(token_id=0) for _ in range(num_tokens))


def record(ttft_s: float, itl_s: tuple[float, ...], **phases: float) -> RequestRecord:
    measurement = Measurement(ttft_s, itl_s, ttft_s + sum(itl_s))
    return RequestRecord("128->64", 128, 0.0, measurement, Phases(**phases))  # type: ignore[arg-type]


FAILED = RequestRecord("128->64", 128, 0.0, None, None, "OVERLOADED: try again")


async def test_ttft_gaps_and_total_follow_the_clock() -> None:
    now_s = 10.0

    async def stream() -> AsyncIterator[Delta]:
        nonlocal now_s
        for wait_s, num_tokens in ((2.0, 1), (0.5, 1), (0.25, 2), (1.0, 0)):
            now_s += wait_s
            yield Delta(sequence=0, index=0, tokens=tokens(num_tokens), text="")

    measured = await measure(stream(), lambda: now_s)
    assert measured == Measurement(ttft_s=2.0, itl_s=(0.5, 0.25, 0.0), total_s=3.75)
    assert measured.num_tokens == 4
    assert measured.tpot_s == pytest.approx(0.25)


def test_a_summary_counts_tokens_over_the_wall_time() -> None:
    summary = summarize([record(1.0, (0.1, 0.3)), record(3.0, ()), FAILED], 2.0, Objective())
    assert (summary.num_requests, summary.num_failed, summary.num_tokens, summary.tokens_per_s) == (3, 1, 4, 2.0)
    assert summary.ttft_ms is not None
    assert (summary.ttft_ms.mean, summary.ttft_ms.p50, summary.ttft_ms.max) == (2000, 2000, 3000)
    assert summary.itl_ms is not None
    assert summary.itl_ms.p50 == pytest.approx(200)
    assert summary.tpot_ms is not None
    assert summary.tpot_ms.mean == pytest.approx(200)
    assert summary.errors == ("OVERLOADED: try again",)


def test_phases_are_averaged_over_the_requests_that_have_them() -> None:
    summary = summarize([record(1.0, (), queue_ms=10.0), record(1.0, (), queue_ms=30.0), FAILED], 1.0, Objective())
    assert summary.phase_means_ms["queue_ms"] == 20.0
    assert summary.phase_means_ms["prefilled_on_decode_worker"] == 0.0


@pytest.mark.parametrize(
    ("objective", "num_good"),
    [
        (Objective(), 3),
        (Objective(ttft_ms=1500), 2),
        (Objective(itl_ms=150), 2),
        (Objective(ttft_ms=1500, itl_ms=150), 1),
        (Objective(tpot_ms=110), 3),
    ],
)
def test_a_good_request_meets_all_of_the_objective_and_a_failed_one_none(objective: Objective, num_good: int) -> None:
    even, late, uneven = record(1.0, (0.1,) * 50), record(2.0, (0.1,) * 50), record(1.0, (0.1,) * 48 + (0.3, 0.3))
    summary = summarize([even, late, uneven, FAILED], 2.0, objective)
    assert summary.good_share == num_good / 4
    assert summary.goodput_requests_per_s == num_good / 2.0
    assert summarize([even, late, uneven, FAILED], 2.0, objective, 8.0).goodput_requests_per_s == 8.0 * num_good / 4


def test_the_handoff_gap_is_the_first_gap_of_requests_that_a_prefill_worker_computed() -> None:
    handed_over = record(1.0, (0.3, 0.1, 0.1, 0.1), queue_ms=1.0)
    stayed = replace(handed_over, phases=Phases(prefilled_on_decode_worker=True))
    summary = summarize([handed_over, stayed, record(1.0, (), queue_ms=1.0), FAILED], 1.0, Objective())
    assert summary.handoff_gap_ms is not None
    assert summary.handoff_gap_ms.p50 == pytest.approx(300)
    assert summary.handoff_gap_ms.max == pytest.approx(300)
    assert summary.handoff_gap_ratio == pytest.approx(3)
    assert summarize([stayed], 1.0, Objective()).handoff_gap_ms is None
