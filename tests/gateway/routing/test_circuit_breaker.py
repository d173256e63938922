"""Breakers of workers and pairs, slow start, and the retry budget."""

from random import random

from gateway.routing.circuit_breaker import INITIAL_LIMIT, UNLIMITED_FROM, PairCircuitBreaker, WorkerCircuitBreaker
from gateway.routing.retry_budget import RetryBudget


def fill(breaker: WorkerCircuitBreaker, now: float, most: int = 1000) -> int:
    """Starts requests until no more are allowed; returns how many."""
    number = 0
    while number < most and breaker.allows(now):
        breaker.start(f"{now}-{number}")
        number += 1
    return number


def test_a_new_worker_gets_few_jobs_until_some_succeed() -> None:
    breaker = WorkerCircuitBreaker(random)
    assert fill(breaker, 1.0) == INITIAL_LIMIT
    assert breaker.on_success("1.0-0") == 2
    assert fill(breaker, 2.0) == 2, "the place of the one that succeeded, and one more"
    breaker.release("1.0-1")
    assert fill(breaker, 3.0) == 1, "one that was given up leaves its place"


def test_a_healthy_worker_has_no_limit() -> None:
    breaker = WorkerCircuitBreaker(random)
    for number in range(UNLIMITED_FROM - INITIAL_LIMIT):
        breaker.start(str(number))
        breaker.on_success(str(number))
    assert fill(breaker, 1.0) == 1000


def test_a_failing_worker_is_avoided_and_then_probed_by_one_request() -> None:
    breaker = WorkerCircuitBreaker(draw=lambda: 1.0)
    for number in range(3):
        assert breaker.allows(1.0)
        breaker.start(str(number))
        breaker.on_failure(str(number), 1.0)
    assert not breaker.allows(1.49)
    assert fill(breaker, 1.5) == 1, "half open"
    breaker.on_failure("1.5-0", 1.6)
    assert not breaker.allows(2.59), "longer than before"
    assert fill(breaker, 2.6) == 1
    breaker.on_success("2.6-0")
    assert fill(breaker, 2.7) == 2


def test_single_failures_open_no_breaker() -> None:
    breaker = WorkerCircuitBreaker(random)
    for number in range(20):
        breaker.start(str(number))
        breaker.on_failure(str(number), 1.0)
        breaker.start("other")
        breaker.on_success("other")
    assert breaker.allows(1.0)


def test_in_an_outage_there_are_at_most_a_fifth_more_attempts_than_requests() -> None:
    budget = RetryBudget(0.0)
    num_requests, num_retries = 400, 0
    for number in range(num_requests):
        budget.on_request()
        while budget.try_acquire(number * 0.1):
            num_retries += 1
    assert 0 < num_retries <= 0.2 * num_requests


def test_a_request_that_waits_for_a_retry_gets_one_at_last() -> None:
    budget = RetryBudget(0.0)
    while budget.try_acquire(0.0):
        pass
    assert not budget.try_acquire(4.0)
    assert budget.try_acquire(6.0)


PAIR = ("d1", "p1")


def test_a_failed_pair_is_left_alone_for_a_while() -> None:
    pairs = PairCircuitBreaker(cooldown_s=10, draw=lambda: 0.0)
    pairs.on_failure(PAIR, 100.0)
    pairs.on_failure(PAIR, 101.0)  # another job of the same moment
    assert pairs.open_pairs(109.9) == {PAIR}
    assert pairs.open_pairs(110.1) == frozenset()


def test_pairs_that_failed_together_are_probed_at_different_times() -> None:
    draws = iter([0.0, 0.9])
    pairs = PairCircuitBreaker(cooldown_s=10, draw=lambda: next(draws))
    pairs.on_failure(PAIR, 100.0)
    pairs.on_failure(("d2", "p1"), 100.0)
    assert pairs.open_pairs(112.0) == {("d2", "p1")}


def test_one_job_probes_a_pair_after_its_cooldown_and_a_failure_doubles_it() -> None:
    pairs = PairCircuitBreaker(cooldown_s=10, draw=lambda: 0.0)
    pairs.on_failure(PAIR, 100.0)
    assert pairs.open_pairs(111.0) == frozenset()
    pairs.on_use(PAIR, 111.0)
    assert pairs.open_pairs(111.5) == {PAIR}, "half open"
    pairs.on_failure(PAIR, 112.0)
    assert pairs.open_pairs(131.9) == {PAIR}
    assert pairs.open_pairs(132.1) == frozenset()


def test_a_successful_probe_closes_the_pairs_breaker() -> None:
    pairs = PairCircuitBreaker(cooldown_s=10, draw=lambda: 0.0)
    pairs.on_failure(PAIR, 100.0)
    pairs.on_use(PAIR, 111.0)
    assert pairs.open_pairs(113.1) == frozenset()
    pairs.on_use(PAIR, 113.2)
    assert pairs.open_pairs(113.3) == frozenset()
