"""A session's peer is alive while anything arrives."""

from kvrelay.core.liveness import Liveness


def test_a_heartbeat_is_due_after_a_third_of_the_window_and_numbers_count_up() -> None:
    liveness = Liveness(window_ms=3000, now=0.0)
    assert liveness.heartbeat_due(0.9) is None
    assert liveness.heartbeat_due(1.0) == 1
    liveness.sent(1.0)
    assert liveness.heartbeat_due(1.9) is None
    assert liveness.heartbeat_due(2.0) == 2


def look_until(liveness: Liveness, begin: float, end: float) -> bool:
    """Looks at every interval from one time to the other; whether the peer was lost at the last
    look.
    """
    lost = False
    for step in range(1, round((end - begin) / liveness.interval_s) + 1):
        lost = liveness.lost(begin + step * liveness.interval_s)
    return lost


def test_a_peer_is_lost_only_when_silent_for_longer_than_the_window() -> None:
    liveness = Liveness(window_ms=3000, now=0.0)
    assert not look_until(liveness, 0.0, 3.0)
    assert liveness.lost(3.01)
    liveness.received(2.5)
    assert liveness.silent_ms(3.5) == 1000.0
    assert not look_until(liveness, 3.0, 5.5)
    assert look_until(liveness, 5.5, 6.0)


def test_time_in_which_this_side_stood_still_is_not_the_peers_silence() -> None:
    liveness = Liveness(window_ms=3000, now=0.0)
    assert not look_until(liveness, 0.0, 2.0)
    assert not liveness.lost(60.0)
    assert not look_until(liveness, 60.0, 60.5)
    assert look_until(liveness, 60.5, 61.5)


def test_a_side_that_always_looks_late_still_loses_a_silent_peer() -> None:
    liveness = Liveness(window_ms=3000, now=0.0)
    assert any(liveness.lost(10.0 * step) for step in range(1, 10))


def test_looking_at_every_interval_keeps_heartbeats_well_within_the_peers_window() -> None:
    liveness = Liveness(window_ms=3000, now=0.0)
    longest, last = 0.0, 0.0
    for step in range(1, 100):
        now = step * liveness.interval_s
        if liveness.heartbeat_due(now):
            liveness.sent(now)
            longest, last = max(longest, now - last), now
    assert 0 < longest <= 1.5
