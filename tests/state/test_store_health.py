"""What the breaker says in the log, and when; under a clock of the test's own."""

import pytest
import structlog.testing

from kvrelay.state.redis_faults import RedisFault
from kvrelay.state.store_health import REPORT_INTERVAL_S, StoreHealth


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def go_away(health: StoreHealth, clock: Clock, seconds: float) -> None:
    """Away for so long, asked again five times meanwhile."""
    assert health.open(TimeoutError())
    for _ in range(5):
        clock.now += seconds / 5
        health.record_failed_probe(RedisFault("Redis does not answer in time"))
    health.close()


def test_moments_are_told_once_a_minute_with_their_number_and_never_as_warnings(clock: Clock) -> None:
    health = StoreHealth(clock)
    with structlog.testing.capture_logs() as lines:
        for _ in range(30):
            go_away(health, clock, seconds=0.625)
            clock.now += 4.375
    assert [(line["log_level"], line["num_moments"], line["longest_ms"]) for line in lines] == [
        ("info", 1, 625),
        ("info", 12, 625),
        ("info", 12, 625),
    ]
    assert 2 * REPORT_INTERVAL_S < 30 * 5


def test_what_lasts_is_a_warning_once_with_its_cause_and_its_end_is_told(clock: Clock) -> None:
    health = StoreHealth(clock, "h:6379")
    with structlog.testing.capture_logs() as lines:
        go_away(health, clock, seconds=30.0)
    away, back = lines
    assert (away["log_level"], away["event"]) == ("warning", "redis is away")
    assert away["cause"] == "Redis does not answer in time"
    assert away["address"] == "h:6379"
    assert (back["log_level"], back["event"], back["away_s"]) == ("info", "redis is back", 30.0)


def test_a_cause_that_changes_is_what_health_says(clock: Clock) -> None:
    health = StoreHealth(clock)
    assert health.problem is None
    assert health.open(ConnectionRefusedError())
    assert "connection refused" in (health.problem or "")
    assert not health.open(TimeoutError()), "no news"
    health.record_failed_probe(RedisFault("Redis is loading its data"))
    assert health.problem == "Redis is loading its data"
    health.close()
    assert health.problem is None
    assert health.healthy
