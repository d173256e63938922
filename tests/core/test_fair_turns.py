"""Shares are served in proportion to their weights, and save nothing up."""

from collections import Counter

from kvrelay.core.fair_turns import MAX_SHARES_KEPT, FairTurns


def serve(turns: FairTurns, number: int, cost: float = 1.0, **weights: int) -> Counter[str]:
    served: Counter[str] = Counter()
    for _ in range(number):
        share = turns.in_order()[0]
        turns.charge(share, cost, weights.get(share, 1))
        served[share] += 1
    return served


def test_shares_are_served_by_weight() -> None:
    turns = FairTurns()
    turns.join("heavy")
    turns.join("light")
    assert serve(turns, 40, heavy=3, light=1) == {"heavy": 30, "light": 10}


def test_a_share_that_comes_late_is_next_and_claims_nothing_for_before() -> None:
    turns = FairTurns()
    turns.join("early")
    serve(turns, 100)
    turns.join("late")
    assert turns.in_order()[0] == "late"
    assert serve(turns, 20) == {"early": 10, "late": 10}


def test_a_share_that_leaves_and_comes_back_at_once_gains_nothing() -> None:
    turns = FairTurns()
    turns.join("stays")
    turns.join("leaves")
    turns.charge("leaves", 100)
    turns.leave("leaves")
    turns.join("leaves")
    assert serve(turns, 99) == {"stays": 99}


def test_all_shares_are_equal_again_after_all_have_left() -> None:
    turns = FairTurns()
    turns.join("one")
    turns.charge("one", 100)
    turns.leave("one")
    turns.leave("one")
    for share in ("one", "other"):
        turns.join(share)
    assert serve(turns, 4) == {"one": 2, "other": 2}


def test_what_is_kept_of_shares_that_left_is_bounded() -> None:
    turns = FairTurns()
    turns.join("stays")
    for number in range(2 * MAX_SHARES_KEPT):
        turns.join(str(number))
        turns.charge(str(number), 1.0)
        turns.leave(str(number))
    assert len(turns._left) <= MAX_SHARES_KEPT
