"""Watches of a server's health: bounded, and no watcher delays another."""

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from kvrelay.errors import InvalidRequestError, OverloadedError
from kvrelay.network import health_service
from kvrelay.network.health_service import HealthService

Status = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING = Status.SERVING, Status.NOT_SERVING


class Watcher:
    """A call's context; it reads only while `reads` is set."""

    def __init__(self, service: HealthService, name: str = "") -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        context: Any = self
        self.call = asyncio.create_task(service.Watch(health_pb2.HealthCheckRequest(service=name), context))

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        await self.reads.wait()
        self.told.put_nowait(message.status)

    async def next(self) -> Any:
        async with asyncio.timeout(60):
            return await self.told.get()

    async def end(self) -> None:
        self.call.cancel()
        await asyncio.wait([self.call])


async def test_every_change_is_told_and_a_repeat_is_not() -> None:
    service = HealthService()
    watcher, other = Watcher(service), Watcher(service, "x")
    assert (await watcher.next(), await other.next()) == (SERVING, Status.SERVICE_UNKNOWN)
    await service.set("", SERVING)
    await service.set("x", SERVING)
    assert await other.next() == SERVING
    await service.set("", NOT_SERVING)
    assert await watcher.next() == NOT_SERVING
    assert watcher.told.empty()
    assert other.told.empty()
    await watcher.end()
    await other.end()
    assert service.num_watches == 0


async def test_a_watcher_that_does_not_read_delays_neither_others_nor_the_change() -> None:
    service = HealthService()
    deaf, watcher = Watcher(service), Watcher(service)
    deaf.reads.clear()
    assert await watcher.next() == SERVING
    async with asyncio.timeout(60):
        await service.set("", NOT_SERVING)
    assert await watcher.next() == NOT_SERVING
    deaf.reads.set()
    while await deaf.next() != NOT_SERVING:
        pass
    await deaf.end()
    await watcher.end()


async def test_watches_above_the_bound_are_refused_and_room_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_service, "MAX_WATCHES", 3)
    service = HealthService()
    watchers = [Watcher(service) for _ in range(3)]
    for watcher in watchers:
        await watcher.next()
    with pytest.raises(OverloadedError, match="call Check"):
        await Watcher(service).call
    await watchers[0].end()
    again = Watcher(service)
    assert await again.next() == SERVING
    for watcher in (*watchers, again):
        await watcher.end()
    assert service.num_watches == 0


async def test_a_long_name_is_not_kept() -> None:
    service = HealthService()
    with pytest.raises(InvalidRequestError, match="129 bytes"):
        await Watcher(service, "x" * 129).call
    assert service.num_watches == 0
