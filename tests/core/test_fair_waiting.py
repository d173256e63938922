"""A full queue is divided among sessions by counts."""

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from kvrelay.core.fair_waiting import who_gives_way
from kvrelay.core.job import Job
from tests.support.jobs import make_job


@dataclass(frozen=True)
class Place:
    spec: Job


def place(number: int, holder: int) -> Place:
    return Place(make_job([1], 1, request_id=f"{number:032x}", holder=holder))


def counts_after(arrivals: list[int], size: int) -> Counter[int]:
    """How many places each session has, after jobs came from these sessions in this order."""
    waiting: list[Place] = []
    for number, holder in enumerate(arrivals):
        newcomer = place(number, holder)
        if len(waiting) >= size:
            loser = who_gives_way(waiting, newcomer.spec)
            if loser is None:
                continue
            waiting.remove(loser)
        waiting.append(newcomer)
        assert len(waiting) <= size
    return Counter(each.spec.holder for each in waiting)


def test_a_session_alone_has_the_whole_queue() -> None:
    assert counts_after([1] * 100, 12) == {1: 12}


def test_a_session_that_filled_the_queue_keeps_what_others_do_not_want() -> None:
    assert counts_after([1] * 100 + [2] * 3, 12) == {1: 9, 2: 3}


@pytest.mark.parametrize("num_sessions", [2, 3, 5])
def test_sessions_that_want_all_get_equal_parts(num_sessions: int) -> None:
    flood = [1] * 1000 + [session for session in range(2, num_sessions + 1) for _ in range(50)]
    counts = counts_after(flood, 30)
    assert sum(counts.values()) == 30
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == num_sessions


def test_the_youngest_of_the_greediest_gives_way_and_equals_never_push_each_other_out() -> None:
    waiting = [place(0, 1), place(1, 2), place(2, 1), place(3, 1)]
    assert who_gives_way(waiting, place(9, 2).spec) is waiting[3]
    assert who_gives_way(waiting, place(9, 1).spec) is None
    assert who_gives_way(waiting[:3], place(9, 2).spec) is None, "both would have two, in turns for ever"
    assert who_gives_way([], place(9, 1).spec) is None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_a_session_that_wants_its_part_has_it(seed: int) -> None:
    random = Random(seed)
    size, sessions = random.randint(1, 20), random.randint(1, 6)
    arrivals = [random.choice([1, 1, 1, random.randint(1, sessions)]) for _ in range(500)]
    counts = counts_after(arrivals, size)
    wanted = Counter(arrivals)
    for session in wanted:
        assert counts[session] >= min(wanted[session], size // len(wanted))
