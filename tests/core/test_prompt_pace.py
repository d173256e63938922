"""Rates are what steps took, and chunks what the rates allow."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.core.prompt_pace import CHUNK_S, NUM_VALUES, ChunkRange, HeldMedian, PromptPace

RANGE = ChunkRange(first=256, least=128, most=1024, step_s=0.1)
SHARED = ChunkRange(first=16, least=16, most=1024, step_s=0.025)


def pace_after(*steps: tuple[int, int, float], shared: ChunkRange | None = SHARED) -> PromptPace:
    """(prompt tokens, decoding sequences, seconds) of each step."""
    pace = PromptPace(RANGE, shared)
    for step in steps:
        pace.record_step(*step)
    return pace


def test_nothing_is_measured_before_three_steps() -> None:
    pace = pace_after((256, 0, 5.0), (256, 0, 0.1))
    assert (pace.tokens_per_s(1024), pace.step_ms, pace.chunk_tokens(1024)) == (0.0, 0.0, 256)
    pace.record_step(256, 0, 0.1)
    assert pace.tokens_per_s(1024) == pytest.approx(2560)


def test_a_rate_is_of_long_prompts_also_where_most_are_short() -> None:
    lengths = [5, 8, 12, 20, 200, 7, 9, 11, 250, 30]
    pace = pace_after(*[(length, 0, 0.01 + length / 1000) for length in lengths])
    assert pace.step_ms == pytest.approx(10, abs=0.1)
    assert pace.tokens_per_s(128) == pytest.approx(128 / 0.138, rel=0.01)


def test_steps_of_one_length_give_a_rate_without_a_fixed_part() -> None:
    pace = pace_after(*[(256, 0, 0.128)] * 5)
    assert pace.step_ms == 0.0
    assert pace.tokens_per_s(1024) == pytest.approx(2000)


def test_steps_that_hung_change_nothing() -> None:
    good = [(256, 0, 0.1), (64, 0, 0.025), (128, 0, 0.05)] * 4
    calm, disturbed = pace_after(*good), pace_after(*good, (256, 0, 60.0), (64, 0, 9.0), *good)
    assert disturbed.tokens_per_s(1024) == calm.tokens_per_s(1024)


def test_steps_beside_decoding_sequences_do_not_count_as_prompts_alone() -> None:
    pace = pace_after(*[(256, 0, 0.1)] * 4, *[(16, 8, 0.04)] * NUM_VALUES)
    assert pace.tokens_per_s(1024) == pytest.approx(2560)
    assert pace.shared_tokens_per_s(1024) == pytest.approx(400)


def test_before_a_shared_step_its_rate_follows_from_the_others() -> None:
    alone = [(length, 0, 0.01 + length / 1000) for length in (20, 200, 30, 180, 25, 190)]
    assert pace_after().shared_tokens_per_s(1024) == 0.0
    assert pace_after(*alone).shared_tokens_per_s(1024) == pytest.approx(16 / 0.026, rel=0.01)
    assert pace_after(*alone, *[(0, 4, 0.034)] * 3).shared_tokens_per_s(1024) == pytest.approx(16 / 0.05, rel=0.01)


def test_noise_does_not_move_a_rate_and_a_lasting_change_does() -> None:
    random, rate = Random(1), HeldMedian()
    seen = set()
    for _ in range(300):
        rate.add(random.uniform(950, 1050))
        seen.add(rate.value)
    assert len(seen - {None}) == 1
    for _ in range(NUM_VALUES):
        rate.add(100.0)
    assert rate.value == 100.0


@pytest.mark.parametrize(("tokens_per_s", "chunk"), [(300, 128), (2000, 192), (6000, 592), (100_000, 1024)])
def test_a_chunk_takes_about_as_long_on_a_slow_and_on_a_fast_processor(tokens_per_s: int, chunk: int) -> None:
    pace = pace_after(*[(256, 0, 256 / tokens_per_s)] * 4)
    assert pace.chunk_tokens(1024) == chunk
    assert chunk in (RANGE.least, RANGE.most) or 0.9 * CHUNK_S < chunk / tokens_per_s <= CHUNK_S


def test_a_number_that_was_given_holds_at_any_rate() -> None:
    pace = PromptPace(ChunkRange.fixed(300), ChunkRange.fixed(7))
    for seconds in [1.0] * 4 + [0.001] * 40:
        pace.record_step(300, 0, seconds)
        pace.record_step(7, 2, seconds)
        pace.record_step(0, 2, seconds)
    assert (pace.chunk_tokens(300), pace.shared_chunk_tokens(300)) == (300, 7)


@settings(max_examples=30)
@given(
    decode_step_ms=st.floats(1, 200),
    tokens_per_s=st.floats(100, 200_000),
    noise=st.floats(0, 0.05),
    seed=st.integers(0, 1000),
)
def test_chunks_beside_sequences_grow_until_their_steps_take_what_they_may(
    decode_step_ms: float, tokens_per_s: float, noise: float, seed: int
) -> None:
    random = Random(seed)
    pace, decode_step_s = PromptPace(RANGE, SHARED), decode_step_ms / 1000

    def step_s(num_tokens: int) -> float:
        return decode_step_s + num_tokens / tokens_per_s

    for _ in range(200):
        chunk = pace.shared_chunk_tokens(1024)
        for num_tokens in (0, chunk):
            pace.record_step(num_tokens, 4, step_s(num_tokens) * random.uniform(1 - noise, 1 + noise))
    chunk = pace.shared_chunk_tokens(1024)
    bound_s = max(SHARED.step_s, 1.5 * decode_step_s)
    assert chunk == SHARED.least or step_s(chunk) <= 1.35 * bound_s
    assert chunk == SHARED.most or step_s(chunk + 1) >= bound_s / 1.35


def test_on_the_processor_that_the_first_chunk_is_for_it_stays() -> None:
    """Two cores with AVX2: 24 ms a step, and 16 tokens more take as long again."""
    pace = pace_after(*[(0, 4, 0.024), (16, 4, 0.048)] * 8)
    assert pace.shared_chunk_tokens(1024) == 16
