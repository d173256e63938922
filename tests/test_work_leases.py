"""Leases of works: one session each, one deadline each, newest attempt wins, each work comes once."""

import asyncio

import pytest

from kvrelay import work_leases
from kvrelay.work import WorkId
from kvrelay.work_leases import WorkLeases


class Bench:
    def __init__(self) -> None:
        self.expired: asyncio.Queue[WorkId] = asyncio.Queue()
        self.superseded: list[WorkId] = []
        self.leases: WorkLeases[object] = WorkLeases(self.expired.put_nowait, self.superseded.append)
        self.session = object()

    def begin(self, attempt: int, sequence: int = 0, request_id: str = "r", deadline_ms: int = 60_000) -> bool:
        return self.leases.begin(WorkId(request_id, attempt, sequence), self.session, deadline_ms)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_newer_attempt_ends_all_works_of_older_ones_of_its_request_only(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.begin(1, request_id="other")
    assert bench.begin(2, 0)
    assert bench.begin(2, 1)
    assert bench.superseded == [WorkId("r", 1)]
    assert bench.leases.session_of(WorkId("r", 1)) is None
    assert len(bench.leases) == 3


async def test_older_attempts_and_works_that_were_here_are_refused_even_after_their_end(bench: Bench) -> None:
    assert bench.begin(2)
    assert not bench.begin(2)
    assert not bench.begin(1)
    assert bench.leases.end(WorkId("r", 2))
    assert not bench.begin(2)
    assert not bench.begin(1)
    assert bench.begin(2, 1)
    assert bench.begin(3)


async def test_a_deadline_is_told_once_and_leaves_the_lease_to_be_ended(bench: Bench) -> None:
    assert bench.begin(1, deadline_ms=1)
    assert await asyncio.wait_for(bench.expired.get(), 5) == WorkId("r", 1)
    assert bench.leases.session_of(WorkId("r", 1)) is bench.session
    assert bench.leases.end(WorkId("r", 1))
    assert not bench.leases.end(WorkId("r", 1))


async def test_a_session_takes_its_works_with_it(bench: Bench) -> None:
    assert bench.begin(1)
    assert bench.leases.begin(WorkId("x", 1), "another session", 60_000)
    assert bench.leases.end_session(bench.session) == [WorkId("r", 1)]
    assert bench.leases.works() == [WorkId("x", 1)]


async def test_waiting_ends_with_the_last_work(bench: Bench) -> None:
    await bench.leases.wait_until_empty()
    assert bench.begin(1)
    waiting = asyncio.create_task(bench.leases.wait_until_empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.leases.end(WorkId("r", 1))
    await asyncio.wait_for(waiting, 5)


async def test_memory_of_attempts_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_leases, "NUM_REMEMBERED_REQUESTS", 2)
    for name in "abc":
        assert bench.begin(2, request_id=name)
        assert bench.leases.end(WorkId(name, 2))
    assert bench.begin(1, request_id="a")
    assert not bench.begin(1, request_id="c")
