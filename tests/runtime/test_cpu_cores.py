import os
import threading

import pytest

from kvrelay.runtime.cpu_cores import available_cores, divide_cores, format_cores, parse_cores, pin_this_thread


def test_cores_are_written_as_numbers_and_ranges() -> None:
    assert parse_cores("3,0-1") == (0, 1, 3)
    assert parse_cores(format_cores((0, 1, 3))) == (0, 1, 3)


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "expected"),
    [
        (2, 2, [(0,), (1,)]),
        (2, 1, [(0, 1)]),
        (5, 2, [(0, 1), (2, 3, 4)]),
        (2, 3, [(), (), ()]),
    ],
)
def test_workers_divide_cores_evenly_or_not_at_all(
    num_cores: int, num_workers: int, expected: list[tuple[int, ...]]
) -> None:
    assert divide_cores(range(num_cores), num_workers) == expected


def test_a_pinned_thread_leaves_the_others_as_they_are() -> None:
    before = available_cores()
    pinned: list[object] = []

    def run() -> None:
        pinned.append(pin_this_thread(before[:1]))
        pinned.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert pinned == [True, {before[0]}]
    assert available_cores() == before


def test_cores_that_are_not_there_leave_the_thread_unpinned() -> None:
    assert not pin_this_thread([100_000])
