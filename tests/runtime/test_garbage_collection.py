"""Full collections of a process that serves: when it is idle, or at last after a while; none by
Python itself.
"""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from kvrelay.runtime import garbage_collection
from kvrelay.runtime.garbage_collection import collecting_when_idle


class Cycle:
    """Garbage that counting references does not find."""

    def __init__(self) -> None:
        self.itself = self


class Process:
    """Says whether it is idle, and is asked often."""

    def __init__(self, *, is_idle: bool) -> None:
        self._is_idle = is_idle
        self._num_asked = 0

    def is_idle(self) -> bool:
        self._num_asked += 1
        return self._is_idle

    async def be_asked(self, times: int) -> None:
        async with asyncio.timeout(30):
            last = self._num_asked + times
            while self._num_asked < last:  # noqa: ASYNC110 - who asks does not wait for anybody
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage_collection, "LOOK_INTERVAL_S", 0.001)
    monkeypatch.setattr(garbage_collection, "MIN_MINOR_COLLECTIONS", 1)
    thresholds = gc.get_threshold()
    yield
    assert gc.get_threshold() == thresholds


def old_garbage() -> "weakref.ref[Cycle]":
    """That has outlived the minor collections."""
    cycle = Cycle()
    for _ in range(2):
        gc.collect(1)
    return weakref.ref(cycle)


async def test_garbage_is_kept_while_something_runs_and_goes_when_nothing_does() -> None:
    busy, idle = Process(is_idle=False), Process(is_idle=True)
    async with collecting_when_idle(busy.is_idle):
        garbage = old_garbage()
        await busy.be_asked(10)
        assert garbage() is not None
        assert gc.get_threshold()[2] == garbage_collection.NEVER
    async with collecting_when_idle(idle.is_idle):
        await idle.be_asked(3)
        assert garbage() is None


async def test_a_process_that_is_never_idle_collects_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = Process(is_idle=False)
    monkeypatch.setattr(garbage_collection, "LONGEST_INTERVAL_S", 0.02)
    async with collecting_when_idle(busy.is_idle):
        garbage = old_garbage()
        async with asyncio.timeout(30):
            while garbage() is not None:  # noqa: ASYNC110 - collections set no event
                await asyncio.sleep(0.001)


async def test_an_idle_process_that_makes_nothing_looks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = Process(is_idle=True)
    monkeypatch.setattr(garbage_collection, "MIN_MINOR_COLLECTIONS", 1000)
    gc.collect()
    async with collecting_when_idle(idle.is_idle):
        garbage = old_garbage()
        await idle.be_asked(10)
        assert garbage() is not None
    gc.collect()
