"""Slow start, the breaker of a worker, and the retry budget: what keeps an outage from becoming a herd."""

from gateway.retry_budget import RetryBudget
from gateway.worker_intake import FIRST_WINDOW, OPEN_WINDOW, WorkerIntake


def fill(intake: WorkerIntake, now: float, most: int = 1000) -> int:
    """How many requests more it takes, each of them begun."""
    number = 0
    while number < most and intake.may_take(now):
        intake.begin(f"{now}-{number}")
        number += 1
    return number


def test_a_new_worker_is_given_little_until_it_has_shown_that_it_works() -> None:
    intake = WorkerIntake()
    assert fill(intake, 1.0) == FIRST_WINDOW
    assert intake.note_success("1.0-0") == 2
    assert fill(intake, 2.0) == 2, "the place of the one that succeeded, and one more"
    intake.end("1.0-1")
    assert fill(intake, 3.0) == 1, "one that was given up leaves its place"


def test_a_worker_that_works_is_open() -> None:
    intake = WorkerIntake()
    for number in range(OPEN_WINDOW - FIRST_WINDOW):
        intake.begin(str(number))
        intake.note_success(str(number))
    assert fill(intake, 1.0) == 1000


def test_a_worker_that_fails_everything_rests_and_is_probed_by_one_request() -> None:
    intake = WorkerIntake(draw=lambda: 1.0)
    for number in range(3):
        assert intake.may_take(1.0)
        intake.begin(str(number))
        intake.note_failure(str(number), 1.0)
    assert not intake.may_take(1.49)
    assert fill(intake, 1.5) == 1, "half open"
    intake.note_failure("1.5-0", 1.6)
    assert not intake.may_take(2.59), "longer than before"
    assert fill(intake, 2.6) == 1
    intake.note_success("2.6-0")
    assert fill(intake, 2.7) == 2


def test_single_failures_open_no_breaker() -> None:
    intake = WorkerIntake()
    for number in range(20):
        intake.begin(str(number))
        intake.note_failure(str(number), 1.0)
        intake.begin("other")
        intake.note_success("other")
    assert intake.may_take(1.0)


def test_in_an_outage_there_are_at_most_a_fifth_more_attempts_than_requests() -> None:
    budget = RetryBudget(0.0)
    num_requests, num_retries = 400, 0
    for number in range(num_requests):
        budget.note_request()
        while budget.can_afford(number * 0.1):
            budget.spend()
            num_retries += 1
    assert 0 < num_retries <= 0.2 * num_requests


def test_a_request_that_waits_for_a_retry_gets_one_at_last() -> None:
    budget = RetryBudget(0.0)
    while budget.can_afford(0.0):
        budget.spend()
    assert not budget.can_afford(4.0)
    assert budget.can_afford(6.0)
