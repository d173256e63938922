"""The state writer when the store fails, or one request's state in it is broken."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, cast

import pytest
import structlog.testing

from gateway.requests import registry
from gateway.requests.registry import RunningRequests
from gateway.requests.runner import RequestRunner
from gateway.state import writer as state_writer
from gateway.state.journal import COUNT_INTERVAL_S, RequestJournal
from gateway.state.writer import StateWriter
from gateway.streaming.output_log import RequestOutput
from kvrelay.core.job import Token
from kvrelay.core.request_state import RequestState
from kvrelay.errors import StateLostError
from kvrelay.state.request_record import RequestRecord
from kvrelay.state.state_store import StateStore
from kvrelay.state.store_health import StoreHealth
from tests.support.redis_fixtures import eventually, make_record


class Store:
    """Has lost the request `broken` and refuses to restore it."""

    healthy = True

    def __init__(self) -> None:
        self.health = StoreHealth()
        self.created: list[str] = []
        self.num_restores = 0
        self.appended: list[tuple[str, int]] = []

    async def append_frames(
        self,
        request_id: str,
        attempt: int,
        position: int,
        frames: Sequence[bytes],
        num_output_tokens: int | None = None,
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


async def test_a_sweep_writes_each_request_once_with_all_its_frames() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    journals = [journal_of(str(number)) for number in range(3 * state_writer.REQUESTS_PER_BATCH + 1)]
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


def test_a_count_alone_is_written_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    output = RequestOutput()
    journal = RequestJournal(make_record(keeps_output=False), output, deadline=1e9, created=True)

    def lacks_after(wait_s: float) -> bool:
        nonlocal now
        now += wait_s
        output.append_delta(0, output.num_output_tokens, Token(5), "", None)
        return journal.lacks_output

    assert lacks_after(0.0)
    journal.on_written(0, output.num_output_tokens)
    assert not lacks_after(COUNT_INTERVAL_S / 2)
    assert lacks_after(COUNT_INTERVAL_S / 2)
    journal.end(RequestState.SUCCEEDED, None)
    assert not journal.lacks_output
    assert journal.dirty


class FlappingStore(Store):
    """Fails again after a few of the waiting requests are written."""

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


async def test_urgent_writes_stay_urgent_after_an_outage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_parallel = state_writer.MAX_PARALLEL_WRITES
    store = FlappingStore(num_good=3)
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    monkeypatch.setattr(writer, "_begin_sweep", lambda: None)  # no sweep comes to them
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


def test_ended_requests_are_kept_up_to_a_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "MAX_ENDED_FRAMES", 10)
    writer = StateWriter(cast(StateStore, Store()), lambda request_id: None)
    for number in range(5):
        journal = journal_of(str(number), num_frames=4)
        journal.end(RequestState.CANCELLED, None)
        writer.track(journal)
    assert writer.num_dropped == 3


class Ended:
    """The parts of an ended runner that count here."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.journal: Any = journal_of(request_id, num_frames=4)
        self.output = self.journal.output


def test_requests_that_can_be_read_again_are_bounded_by_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_ENDED_FRAMES", 10)
    requests = RunningRequests()
    for number in range(5):
        requests.on_ended(cast(RequestRunner, Ended(str(number))))
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
    await asyncio.wait_for(draining, 30)
    assert store.created == ["last"]
    assert store.appended == [("last", 3)]


async def test_the_last_writes_wait_only_for_their_timeout() -> None:
    store = Store()
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    writer.track(journal_of("last"))
    store.health.open(TimeoutError())
    await asyncio.wait_for(writer.drain(timeout_s=0.05), 30)
    assert not store.created


class DefectiveStore(Store):
    """Raises `num_failures` errors that are no outage."""

    def __init__(self, num_failures: int) -> None:
        super().__init__()
        self.num_tries = 0
        self._num_failures = num_failures

    async def create(self, record: RequestRecord) -> bool:
        self.num_tries += 1
        if self.num_tries <= self._num_failures:
            raise ValueError("nobody has thought of this")
        return await super().create(record)

    async def transition(self, request_id: str, attempt: int, to_state: RequestState, **_changes: Any) -> bool:
        self.ended = to_state
        return True


@pytest.fixture
def no_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_writer, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(state_writer, "MAX_PAUSE_S", 0.001)


@pytest.mark.usefixtures("no_rests")
async def test_the_end_of_a_request_is_written_after_an_unknown_error() -> None:
    store = DefectiveStore(num_failures=state_writer.MAX_TRIES_OF_ENDED - 1)
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    journal = journal_of("r1", num_frames=3)
    journal.end(RequestState.CANCELLED, None)
    with structlog.testing.capture_logs() as lines:
        writer.track(journal)
        running = asyncio.create_task(writer.run())

        async def written() -> bool:
            return getattr(store, "ended", None) is RequestState.CANCELLED

        await eventually(written)
        running.cancel()
    assert store.appended == [("r1", 3)]
    assert writer.num_dropped == 0
    assert [line["log_level"] for line in lines] == ["error"], "said once, not with each try"


@pytest.mark.usefixtures("no_rests")
async def test_writes_of_an_ended_request_are_abandoned_after_several_tries_and_logged() -> None:
    store = DefectiveStore(num_failures=10**9)
    writer = StateWriter(cast(StateStore, store), lambda request_id: None)
    journal = journal_of("r1")
    writer.track(journal)
    running = asyncio.create_task(writer.run())

    async def tried_often() -> bool:
        return store.num_tries > 2 * state_writer.MAX_TRIES_OF_ENDED

    async def dropped() -> bool:
        return writer.num_dropped == 1

    await eventually(tried_often)
    assert writer.num_dropped == 0, "it runs, and its end is to come"
    journal.end(RequestState.CANCELLED, None)
    writer.write_soon(journal)
    num_before = store.num_tries
    with structlog.testing.capture_logs() as lines:
        await eventually(dropped)
    assert state_writer.MAX_TRIES_OF_ENDED - 1 <= store.num_tries - num_before <= state_writer.MAX_TRIES_OF_ENDED
    assert any("dropped" in line["event"] for line in lines)
    running.cancel()


def test_failed_writes_back_off_until_one_succeeds() -> None:
    failures = state_writer.WriteFailures()
    now, rests = 0.0, []
    for _ in range(12):
        assert failures.may_try("r1", now)
        failures.count("r1", is_ended=True, now=now)
        begin = now
        while not failures.may_try("r1", now):
            now += 0.05
        rests.append(now - begin)
    assert max(rests) <= state_writer.MAX_PAUSE_S + 0.1
    assert rests[8] > 10 * rests[0]
    assert failures.may_try("another", 0.0)
    failures.forget("r1")
    assert failures.count("r1", is_ended=True, now=now) == 1
