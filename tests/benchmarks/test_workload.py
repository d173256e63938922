"""Workloads as they are written, and the requests that come of them."""

from collections import Counter

import pytest

from benchmarks.workload import PROMPT_TOKEN_IDS, Lengths, WorkloadPart, parse_workload, plan_requests
from kvrelay.errors import ConfigError


def test_lengths_are_fixed_uniform_or_mixed() -> None:
    assert parse_workload("128->64") == (WorkloadPart(100.0, Lengths(128, 128), Lengths(64, 64)),)
    assert parse_workload("64..256->32..48") == (WorkloadPart(100.0, Lengths(64, 256), Lengths(32, 48)),)
    mix = parse_workload("90%:128->64, 10%:2048->32")
    assert [(part.weight, part.name) for part in mix] == [(90.0, "128->64"), (10.0, "2048->32")]


@pytest.mark.parametrize("text", ["", "128", "128-64", "64..32->8", "0->8", "a%:1->2"])
def test_what_is_no_workload_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_workload(text)


def test_a_seed_gives_the_same_requests_at_times_that_scale_with_the_rate() -> None:
    workload = parse_workload("90%:8..16->4,10%:64->2..3")
    slow, fast = plan_requests(workload, 200, 7, 1.0), plan_requests(workload, 200, 7, 4.0)
    assert [request.prompt_token_ids for request in slow] == [request.prompt_token_ids for request in fast]
    for one, other in zip(slow, fast, strict=True):
        assert one.at_s is not None
        assert other.at_s == pytest.approx(one.at_s / 4)
    assert slow != plan_requests(workload, 200, 8, 1.0)
    assert all(request.at_s is None for request in plan_requests(workload, 5, 7))


def test_requests_are_drawn_within_their_lengths_and_by_their_shares() -> None:
    requests = plan_requests(parse_workload("90%:8..16->4,10%:64->2..3"), 500, 1)
    counts = Counter(request.kind for request in requests)
    assert counts["8..16->4"] > 8 * counts["64->2..3"] > 0
    for request in requests:
        least, most, outputs = (8, 16, {4}) if request.kind == "8..16->4" else (64, 64, {2, 3})
        assert least <= len(request.prompt_token_ids) <= most
        assert request.max_tokens in outputs
        assert all(token_id in PROMPT_TOKEN_IDS for token_id in request.prompt_token_ids)


def test_poisson_arrivals_come_at_the_rate_asked_for() -> None:
    requests = plan_requests(parse_workload("1->1"), 2000, 3, 5.0)
    assert requests[-1].at_s == pytest.approx(400, rel=0.1)
