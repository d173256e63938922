"""What the state writer does when the store, or one request's state in it, is not as it should be."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from gateway import running_requests, state_writer
from gateway.request_journal import RequestJournal
from gateway.request_output import RequestOutput
from gateway.request_runner import RequestRunner
from gateway.running_requests import RunningRequests
from gateway.state_writer import StateWriter
from kvrelay.errors import StateLostError
from kvrelay.redis_connection import StoreHealth
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState
from kvrelay.state_store import StateStore
from tests.redis_fixtures import eventually, make_record


class Store:
    """Has lost the request `broken`, and cannot take it back either."""

    healthy = True

    def __init__(self) -> None:
        self.health = StoreHealth()
        self.created: list[str] = []
        self.num_restores = 0
        self.appended: list[tuple[str, int]] = []

    async def append_frames(
        self, request_id: str, attempt: int, position: int, frames: Sequence[bytes], num_output_tokens: int | None = None
    ) -> int:
        self.appended.append((request_id, len(frames)))
        return position + len(frames)

    async def create(self, record: RequestRecord) -> bool:
        if record.request_id == "broken":
            raise StateLostError("lost")
        self.created.append(record.request_id)
        return True

    async def restore(self, record: RequestRecord, frames: Sequence[bytes]) -> bool:
        self.num_restores += 1
        raise ValueError("a defect")


def journal_of(request_id: str, num_frames: int = 0) -> RequestJournal:
    output = RequestOutput()
    for _ in range(num_frames):
        output.append_accepted(request_id, "model", 1, 1)
    return RequestJournal(make_record(request_id), output, deadline=1e9)


async def test_a_request_whose_restoring_fails_does_not_stop_the_writer() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    running = asyncio.create_task(writer.run())
    writer.track(journal_of("broken"))

    async def tried() -> bool:
        return store.num_restores > 0

    async def written() -> bool:
        return "next" in store.created

    await eventually(tried)
    writer.track(journal_of("next"))
    await eventually(written)
    assert not running.done()
    running.cancel()


async def test_a_pass_comes_to_every_request_once_and_writes_all_its_frames_together() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    journals = [journal_of(str(number)) for number in range(3 * state_writer.REQUESTS_PER_PORTION + 1)]
    for journal in journals:
        writer.track(journal)
    running = asyncio.create_task(writer.run())

    async def all_created() -> bool:
        return len(store.created) == len(journals)

    async def all_written() -> bool:
        return len(store.appended) >= len(journals)

    await eventually(all_created)
    for journal in journals:
        for _ in range(3):
            journal.output.append_accepted(journal.request_id, "model", 1, 1)
    await eventually(all_written)
    assert sorted(store.appended) == [(journal.request_id, 3) for journal in journals]
    running.cancel()


class FlappingStore(Store):
    """Goes away once more, when a few requests are written that waited for it."""

    def __init__(self, num_good: int) -> None:
        super().__init__()
        self._num_good = num_good

    @property
    def healthy(self) -> bool:  # type: ignore[override]
        return self.health.healthy

    async def create(self, record: RequestRecord) -> bool:
        if len(self.created) == self._num_good:
            self._num_good = -1
            self.health.open(TimeoutError())
        self.health.check()
        return await super().create(record)


async def test_what_is_urgent_is_so_still_when_the_store_is_back_after_it_went_away_in_the_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_parallel = state_writer.MAX_PARALLEL_WRITES
    store = FlappingStore(num_good=3)
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    monkeypatch.setattr(writer, "_begin_pass", lambda: None)  # no pass comes to them
    for number in range(5 * num_parallel):
        writer.track(journal_of(str(number)))
    running = asyncio.create_task(writer.run())

    async def is_away() -> bool:
        return not store.health.healthy

    async def others_created() -> bool:
        return len(store.created) == 3 + 4 * num_parallel

    await eventually(is_away)
    assert len(store.created) == 3
    store.health.close()
    await eventually(others_created)
    running.cancel()


def test_what_is_kept_of_ended_requests_is_bounded_by_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "MAX_ENDED_FRAMES", 10)
    writer = StateWriter(cast(StateStore, Store()), lambda request_id: None)
    for number in range(5):
        journal = journal_of(str(number), num_frames=4)
        journal.end(RequestState.CANCELLED, None)
        writer.track(journal)
    assert writer.num_dropped == 3


class Ended:
    """As much of an ended runner as counts here."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.journal: Any = journal_of(request_id, num_frames=4)
        self.output = self.journal.output


def test_requests_that_can_be_read_again_are_bounded_by_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_requests, "MAX_ENDED_FRAMES", 10)
    requests = RunningRequests()
    for number in range(5):
        requests.note_ended(cast(RequestRunner, Ended(str(number))))
    assert [requests.find(str(number)) is not None for number in range(5)] == [False, False, False, True, True]


async def test_the_last_writes_wait_for_a_store_that_is_away_for_a_moment() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    writer.track(journal_of("last", num_frames=3))
    store.health.open(TimeoutError())
    draining = asyncio.create_task(writer.drain(timeout_s=30))
    await asyncio.sleep(0)
    assert not draining.done()
    assert not store.created
    store.health.close()
    await asyncio.wait_for(draining, 5)
    assert store.created == ["last"]
    assert store.appended == [("last", 3)]


async def test_the_last_writes_wait_no_longer_than_they_may() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    writer.track(journal_of("last"))
    store.health.open(TimeoutError())
    await asyncio.wait_for(writer.drain(timeout_s=0.05), 5)
    assert not store.created
