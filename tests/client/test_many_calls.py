"""A client with more calls at once than a connection takes opens more, up to a bound."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.errors import DeadlineError
from kvrelay.network import connection_pool, rpc
from kvrelay.network.connection_limits import ConnectionLimits
from kvrelay.network.connection_pool import ConnectionPool, PooledChannel, PooledSyncChannel
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_inference_service import accepted, delta, finished

STREAMS = 4
"""That the server allows on one connection."""


class HeldService(inference_pb2_grpc.InferenceServiceServicer):
    """Holds each request until `may_end`; knows over which connections they came."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.came = asyncio.Condition()
        self.may_end = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async with self.came:
            self.peers.append(context.peer())
            self.came.notify_all()
        yield inference_pb2.GenerateResponse(accepted=accepted())
        await self.may_end.wait()
        yield inference_pb2.GenerateResponse(delta=delta(0, "a", last=True))
        yield inference_pb2.GenerateResponse(finished=finished(num_tokens=1))

    async def ListModels(self, request: Any, context: Any) -> Any:
        return inference_pb2.ListModelsResponse()

    async def wait_for(self, num_requests: int) -> None:
        async with asyncio.timeout(60), self.came:
            await self.came.wait_for(lambda: len(self.peers) >= num_requests)


@pytest.fixture
async def held() -> AsyncIterator[tuple[HeldService, str]]:
    service = HeldService()  # type: ignore[abstract]
    server = rpc.create_server(limits=ConnectionLimits(max_streams=STREAMS))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_pool, "CALLS_PER_CONNECTION", STREAMS)
    monkeypatch.setattr(connection_pool, "MAX_CONNECTIONS", 3)


async def given_back(client: AsyncClient) -> None:
    """Waits until no call counts, a moment behind the last answer."""
    ((_, channel),) = client._channels.values()
    assert isinstance(channel, PooledChannel)
    async with asyncio.timeout(60):
        while channel.pool.num_calls:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)


async def test_requests_above_a_connections_number_run_on_further_connections(held: tuple[HeldService, str]) -> None:
    service, address = held
    async with AsyncClient(address, timeout_s=60) as client:
        running = [asyncio.create_task(client.complete("x")) for _ in range(3 * STREAMS)]
        await service.wait_for(3 * STREAMS)
        assert len(set(service.peers)) == 3
        service.may_end.set()
        await asyncio.gather(*running)
        await given_back(client)


async def test_requests_above_all_connections_wait_and_then_run(held: tuple[HeldService, str]) -> None:
    service, address = held
    async with AsyncClient(address, timeout_s=60) as client:
        running = [asyncio.create_task(client.complete("x")) for _ in range(5 * STREAMS)]
        await service.wait_for(3 * STREAMS)
        with pytest.raises(DeadlineError):
            await client.complete("x", timeout_s=0.2)
        assert len(service.peers) == 3 * STREAMS
        service.may_end.set()
        completions = await asyncio.gather(*running)
    assert len(completions) == 5 * STREAMS == len(service.peers)
    assert len(set(service.peers)) == 3


async def test_cancelled_requests_and_short_calls_give_back_their_room(held: tuple[HeldService, str]) -> None:
    service, address = held
    async with AsyncClient(address, timeout_s=60) as client:
        running = [asyncio.create_task(client.complete("x")) for _ in range(STREAMS)]
        await service.wait_for(STREAMS)
        for each in running:
            each.cancel()
        await asyncio.wait(running)
        for _ in range(3 * STREAMS):
            await client.list_models()
        await given_back(client)


async def test_a_blocking_client_does_the_same(held: tuple[HeldService, str]) -> None:
    service, address = held

    def complete_all() -> int:
        with Client(address, timeout_s=60) as client:
            client.list_models()
            threads = [threading.Thread(target=client.complete, args=("x",)) for _ in range(4 * STREAMS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            service_peers = len(set(service.peers))
            ((_, channel),) = client._channels.values()
            assert isinstance(channel, PooledSyncChannel)
            while channel.pool.num_calls:  # gRPC's thread tells a moment later
                threading.Event().wait(0.01)
            return service_peers

    blocking = asyncio.create_task(asyncio.to_thread(complete_all))
    await service.wait_for(3 * STREAMS)
    service.may_end.set()
    assert await asyncio.wait_for(blocking, 60) == 3
    assert len(service.peers) == 4 * STREAMS


def test_room_is_taken_again_on_the_first_connection_that_has_some() -> None:
    pool = ConnectionPool(object)
    taken = [pool.take() for _ in range(STREAMS + 1)]
    assert [connection is taken[0] for connection in taken] == [True] * STREAMS + [False]
    pool.give_back(taken[0])
    assert pool.take() is taken[0]
    assert len(pool.channels) == 2
