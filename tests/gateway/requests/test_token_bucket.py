"""A budget that refills: no more than a minute's, debts included."""

import math

from gateway.requests.token_bucket import TokenBucket


def test_a_rest_of_hours_saves_up_a_minute_only() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.is_full(3600.0)
    bucket.take(60)
    assert bucket.seconds_until(1, 3600.0) == 1.0


def test_a_debt_is_refilled_before_anything_is_there() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(90)
    assert not bucket.is_full(0.0)
    assert bucket.seconds_until(1, 0.0) == 31.0
    assert bucket.seconds_until(1, 31.0) == 0.0


def test_another_rate_keeps_the_debt_and_gives_nothing() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(90)
    bucket.set_rate(120, 0.0)
    assert bucket.seconds_until(1, 0.0) == 15.5
    full = TokenBucket(600, now=0.0)
    full.set_rate(6, 0.0)
    full.take(6)
    assert full.seconds_until(1, 0.0) == 10.0


def test_an_empty_budget_never_has_anything() -> None:
    assert TokenBucket(0, now=0.0).seconds_until(1, 10_000.0) == math.inf
