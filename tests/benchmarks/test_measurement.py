"""What the benchmark computes from the times that a client sees."""

from collections.abc import AsyncIterator

import pytest

from benchmarks.measurement import Measurement, measure, summarize
from kvrelay.client import Delta
from kvrelay.work import Token


def tokens(num_tokens: int) -> tuple[Token, ...]:
    return tuple(Token(token_id=0) for _ in range(num_tokens))


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


def test_a_summary_counts_tokens_over_the_wall_time() -> None:
    summary = summarize([Measurement(1.0, (0.1, 0.3), 1.4), Measurement(3.0, (), 3.0)], wall_s=2.0)
    assert (summary.num_requests, summary.num_tokens, summary.tokens_per_s) == (2, 4, 2.0)
    assert summary.ttft_ms_p50 == pytest.approx(2000)
    assert summary.itl_ms_p50 == pytest.approx(200)
    assert summary.tpot_ms_mean == pytest.approx(200)
