"""What a handoff costs is what the last ones to that worker cost."""

import pytest

from gateway.routing.handoff_costs import LIFETIME_S, MAX_RECEIVERS, HandoffCosts
from kvrelay.core.job import JobId


def hand_off(
    costs: HandoffCosts, receiver: str, num_tokens: int, transfer_ms: float, exposed_ms: float, wire_ms: float
) -> None:
    job_id = JobId("a" * 32, 1)
    costs.begin(job_id, receiver, num_tokens)
    costs.record(job_id, transfer_ms, exposed_ms, wire_ms, now=10.0)


def measured(costs: HandoffCosts, receiver: str) -> tuple[float, float]:
    cost = costs.to(receiver, 10.0)
    assert cost is not None
    return cost.tokens_per_s, cost.tail_s


def test_a_transfer_behind_prefill_costs_its_tail_only() -> None:
    costs = HandoffCosts()
    for _ in range(3):
        assert costs.to("d", 10.0) is None
        hand_off(costs, "d", 1000, transfer_ms=500, exposed_ms=4, wire_ms=100)
    assert measured(costs, "d") == pytest.approx((10_000, 0.004))
    assert costs.to("other", 10.0) is None


def test_what_a_slow_link_exposes_grows_with_the_prompt() -> None:
    costs = HandoffCosts()
    for _ in range(3):
        hand_off(costs, "d", 1000, transfer_ms=5003, exposed_ms=4803, wire_ms=5000)
    cost = costs.to("d", 10.0)
    assert cost is not None
    assert cost.seconds(1000, prefill_s=0.2) == pytest.approx(4.803)
    assert cost.seconds(100, prefill_s=0.02) == pytest.approx(0.483)


def test_a_transfer_that_hung_changes_nothing() -> None:
    costs = HandoffCosts()
    for wire_ms in (100, 100, 60_000, 100, 100):
        hand_off(costs, "d", 1000, transfer_ms=wire_ms + 400, exposed_ms=4, wire_ms=wire_ms)
    assert measured(costs, "d") == pytest.approx((10_000, 0.004))


def test_what_is_old_is_measured_again_by_one_transfer() -> None:
    costs = HandoffCosts()
    for _ in range(3):
        hand_off(costs, "d", 1000, 500, 4, 100)
    assert costs.to("d", 10.0 + LIFETIME_S) is not None
    assert costs.to("d", 10.1 + LIFETIME_S) is None
    hand_off(costs, "d", 1000, 500, 4, 100)
    assert costs.to("d", 10.0) is not None


def test_nothing_is_kept_of_jobs_that_ended_or_of_workers_long_gone() -> None:
    costs = HandoffCosts()
    job_id = JobId("a" * 32, 1)
    costs.begin(job_id, "d", 1000)
    costs.discard(job_id)
    costs.record(job_id, 500, 4, 100, now=10.0)
    hand_off(costs, "d", 1000, transfer_ms=0, exposed_ms=0, wire_ms=0)  # it ended with its first token
    for number in range(MAX_RECEIVERS + 1):
        for _ in range(3):
            hand_off(costs, f"d{number}", 1000, 500, 4, 100)
    assert [costs.to(name, 10.0) is None for name in ("d", "d0", "d1", f"d{MAX_RECEIVERS}")] == [
        True,
        True,
        False,
        False,
    ]
