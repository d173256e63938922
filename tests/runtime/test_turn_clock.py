"""An engine's turn lasts only while its process runs."""

import pytest

from kvrelay.runtime.own_time import TurnClock

INTERVAL_S = 0.5


def looks(clock: TurnClock, *at: tuple[float, float]) -> list[float]:
    return [clock.look(turn_s, now) for turn_s, now in at]


def test_a_turn_of_a_running_process_counts_whole() -> None:
    assert looks(TurnClock(INTERVAL_S), (0.0, 10.0), (0.3, 10.5), (0.8, 11.0), (1.3, 11.5)) == [0.0, 0.3, 0.8, 1.3]


def test_what_a_stopped_process_stood_still_does_not_count() -> None:
    seen = looks(TurnClock(INTERVAL_S), (0.2, 10.0), (60.7, 70.5), (61.2, 71.0))
    assert seen == pytest.approx([0.2, 0.7, 1.2])


def test_a_turn_that_began_while_nobody_looked_is_not_longer_than_it_is() -> None:
    assert looks(TurnClock(INTERVAL_S), (0.0, 10.0), (1.0, 20.5), (1.5, 21.0)) == pytest.approx([0.0, 0.0, 0.0])


def test_the_next_turn_counts_from_its_own_beginning() -> None:
    clock = TurnClock(INTERVAL_S)
    looks(clock, (0.2, 10.0), (60.7, 70.5))
    assert looks(clock, (0.1, 71.0), (0.6, 71.5)) == pytest.approx([0.1, 0.6])


def test_a_turn_that_never_ends_is_noticed_on_a_late_loop_too() -> None:
    clock = TurnClock(INTERVAL_S)
    seen = looks(clock, *((2 * number, 10.0 + 2 * number) for number in range(20)))
    assert seen[-1] == pytest.approx(19 * INTERVAL_S)
