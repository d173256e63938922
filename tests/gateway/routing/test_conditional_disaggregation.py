"""Which of two workers computes a prompt."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.conditional_disaggregation import InFlightPrompts, predict, without_rates
from gateway.routing.handoff_costs import HandoffCost
from kvrelay.core.job import JobId, WorkerLoad

IDLE = WorkerLoad()
DECODING = WorkerLoad(num_running=4)


def should_prefill_locally(
    num_tokens: int, decode: WorkerLoad, prefill: WorkerLoad, handoff: HandoffCost | None = None
) -> bool:
    return predict(num_tokens, decode, prefill, handoff).is_local


def at_rate(tokens_per_s: float, shared: float = 0.0, num_running: int = 0) -> WorkerLoad:
    return WorkerLoad(num_running, prefill_tokens_per_s=tokens_per_s, shared_prefill_tokens_per_s=shared)


def busy(*prompts: int) -> WorkerLoad:
    """A prefill worker with prompts of these lengths."""
    return WorkerLoad(num_running=1, num_waiting=len(prompts) - 1, num_queued_prompt_tokens=sum(prompts))


@pytest.mark.parametrize(("num_tokens", "is_local"), [(1, True), (127, True), (128, False), (2048, False)])
def test_between_idle_workers_short_prompts_stay_and_long_ones_leave(num_tokens: int, is_local: bool) -> None:
    assert should_prefill_locally(num_tokens, IDLE, IDLE) is is_local


@pytest.mark.parametrize(("num_tokens", "is_local"), [(1, True), (127, True), (128, False), (2048, False)])
def test_beside_running_sequences_only_short_prompts_stay(num_tokens: int, is_local: bool) -> None:
    assert should_prefill_locally(num_tokens, DECODING, IDLE) is is_local


def test_an_idle_decode_worker_takes_prompts_that_would_wait_long() -> None:
    assert not should_prefill_locally(2048, IDLE, busy(1024))
    assert should_prefill_locally(2048, IDLE, busy(2048, 2048))


def test_beside_running_sequences_a_long_prompt_stays_only_if_it_would_wait_very_long() -> None:
    assert not should_prefill_locally(2048, DECODING, busy(*[2048] * 3))
    assert should_prefill_locally(2048, DECODING, busy(*[2048] * 8))


def test_a_long_prompt_leaves_if_sequences_are_about_to_decode() -> None:
    alone, beside_another = WorkerLoad(num_waiting=1), WorkerLoad(num_waiting=2)
    assert should_prefill_locally(2048, alone, busy(2048, 2048))
    assert not should_prefill_locally(2048, beside_another, busy(2048, 2048))
    assert should_prefill_locally(127, beside_another, IDLE)


def test_a_decode_worker_with_prompts_of_its_own_takes_no_more() -> None:
    assert should_prefill_locally(60, IDLE, IDLE)
    assert not should_prefill_locally(60, WorkerLoad(num_queued_prompt_tokens=60), IDLE)


def test_a_short_prompt_behind_a_long_one_leaves_because_it_overtakes_it() -> None:
    assert not should_prefill_locally(500, IDLE, busy(2048))
    assert should_prefill_locally(500, IDLE, busy(*[500] * 4))


def test_prompts_that_were_sent_count_until_the_worker_has_computed_them() -> None:
    sent = InFlightPrompts()
    reported = WorkerLoad(num_computed_prompt_tokens=1000)
    assert sent.expected_load(reported) is reported
    sent.add(JobId("a", 1), 50, reported)
    sent.add(JobId("b", 1), 60, reported)
    assert sent.expected_load(reported) == replace(reported, num_waiting=2, num_queued_prompt_tokens=110)
    later = WorkerLoad(num_running=1, num_computed_prompt_tokens=1030, num_queued_prompt_tokens=20)
    assert sent.expected_load(later) == replace(later, num_waiting=1, num_queued_prompt_tokens=80)
    sent.remove(JobId("a", 1))
    sent.remove(JobId("b", 1))
    sent.remove(JobId("b", 1))
    assert sent.expected_load(later) is later


def test_what_other_gateways_sent_counts_as_the_worker_reports_it() -> None:
    sent = InFlightPrompts()
    reported = WorkerLoad(num_running=1, num_waiting=5, num_queued_prompt_tokens=9000)
    sent.add(JobId("a", 1), 50, reported)
    assert sent.expected_load(reported) == reported


def test_of_short_prompts_that_come_at_once_only_the_first_ones_stay() -> None:
    decode, prefill = InFlightPrompts(), InFlightPrompts()
    is_local = []
    for number in range(6):
        is_local.append(should_prefill_locally(100, decode.expected_load(IDLE), prefill.expected_load(IDLE)))
        (decode if is_local[-1] else prefill).add(JobId(str(number), 1), 100, IDLE)
    assert is_local == [True, False, False, True, False, False]


@given(
    num_tokens=st.integers(1, 8192),
    num_running=st.integers(0, 64),
    queues=st.lists(st.integers(0, 100_000), min_size=2, max_size=6).map(sorted),
)
def test_a_longer_queue_never_draws_prompts(num_tokens: int, num_running: int, queues: list[int]) -> None:
    on_decode = [
        should_prefill_locally(
            num_tokens, WorkerLoad(num_running=num_running, num_queued_prompt_tokens=queue), busy(500)
        )
        for queue in queues
    ]
    assert all(earlier >= later for earlier, later in pairwise(on_decode))


@given(num_tokens=st.integers(1, 8192), num_prompts=st.integers(1, 200))
def test_no_prompt_waits_behind_many_of_its_length_while_a_decode_worker_is_idle(
    num_tokens: int, num_prompts: int
) -> None:
    assert num_prompts < 2 or should_prefill_locally(num_tokens, IDLE, busy(*[num_tokens] * num_prompts))


# --- Measured rates


@pytest.mark.parametrize(
    ("decode_rate", "prefill_rate", "is_local"),
    [(1000, 10_000, False), (10_000, 1000, True), (1000, 1249, True), (1000, 1251, False)],
)
def test_between_idle_workers_the_sooner_one_computes_a_prompt(
    decode_rate: float, prefill_rate: float, is_local: bool
) -> None:
    """1,000 tokens take a second here; there, 0.8 s at the border, and 0.2 s for the handoff."""
    handoff = HandoffCost(tokens_per_s=1e9, tail_s=0.2)
    prediction = predict(1000, at_rate(decode_rate), at_rate(prefill_rate), handoff)
    assert prediction.is_local is is_local
    assert prediction.on_decode_worker == pytest.approx(1000 / decode_rate)
    assert prediction.on_prefill_worker == pytest.approx(1000 / prefill_rate + 0.2)


@given(
    num_tokens=st.integers(1, 8192),
    decode_rate=st.floats(10, 1e6),
    prefill_rate=st.floats(10, 1e6),
    link_rate=st.floats(1, 1e8),
    tail_s=st.floats(0, 10),
)
def test_nobody_waits_for_a_handoff_that_costs_more_than_it_saves(
    num_tokens: int, decode_rate: float, prefill_rate: float, link_rate: float, tail_s: float
) -> None:
    handoff = HandoffCost(link_rate, tail_s)
    there_s = max(num_tokens / prefill_rate, num_tokens / link_rate) + tail_s
    here_s = num_tokens / decode_rate
    is_local = should_prefill_locally(num_tokens, at_rate(decode_rate), at_rate(prefill_rate), handoff)
    if abs(here_s - there_s) > 1e-9 * here_s:
        assert is_local is (here_s < there_s)


def test_a_transfer_counts_only_as_far_as_the_prompt_does_not_hide_it() -> None:
    assert HandoffCost(tokens_per_s=1000, tail_s=0.01).seconds(500, prefill_s=0.4) == pytest.approx(0.11)
    assert HandoffCost(tokens_per_s=1000, tail_s=0.01).seconds(500, prefill_s=0.6) == pytest.approx(0.01)


def test_beside_sequences_the_rate_of_shared_steps_counts() -> None:
    decode, handoff = at_rate(5000, shared=200, num_running=4), HandoffCost(1e9, 0.0)
    assert not should_prefill_locally(1000, decode, at_rate(1000), handoff)
    assert should_prefill_locally(1000, replace(decode, num_running=0), at_rate(1000), handoff)


def test_a_queue_counts_at_the_rate_of_its_worker() -> None:
    handoff = HandoffCost(1e9, 0.0)
    fast_but_busy = replace(busy(*[1000] * 9), prefill_tokens_per_s=10_000)
    assert should_prefill_locally(2000, at_rate(2500), fast_but_busy, handoff)
    assert not should_prefill_locally(2000, at_rate(1500), fast_but_busy, handoff)


@given(num_tokens=st.integers(1, 8192), num_running=st.integers(0, 4), queue=st.integers(0, 20_000))
def test_one_measured_rate_alone_changes_no_decision(num_tokens: int, num_running: int, queue: int) -> None:
    decode = WorkerLoad(num_running=num_running)
    unmeasured = predict(num_tokens, decode, busy(queue))
    for measured in (
        predict(num_tokens, replace(decode, prefill_tokens_per_s=512.0), busy(queue)),
        predict(num_tokens, decode, replace(busy(queue), prefill_tokens_per_s=1024.0)),
    ):
        assert measured.is_local is unmeasured.is_local


def test_old_rates_count_as_not_measured() -> None:
    load = replace(at_rate(100, shared=10, num_running=3), num_blocks=7)
    assert without_rates(load) == WorkerLoad(num_running=3, num_blocks=7)
