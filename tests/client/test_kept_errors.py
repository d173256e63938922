"""Callers keep errors as long as they like: connections of closed clients do not stay for that."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import pytest

from kvrelay import errors
from kvrelay.client import AsyncClient, Client
from kvrelay.testing.process_files import num_connections_to
from kvrelay.testing.waiting import wait_until
from tests.support.fake_inference_service import FakeInferenceService, accepted, delta, start_fake, then_raise

REFUSAL = errors.InvalidRequestError("text", "no")


async def _stream(client: AsyncClient) -> None:
    await client.complete("hello")


async def _half_a_stream(client: AsyncClient) -> None:
    await client.complete("half")


async def _turn(client: AsyncClient) -> None:
    async with client.converse() as conversation:
        await conversation.send("hello").text()


async def _unary(client: AsyncClient) -> None:
    await client.get_request("0" * 32)


def _blocking_stream(client: Client) -> None:
    client.complete("hello")


def _blocking_turn(client: Client) -> None:
    with client.converse() as conversation:
        conversation.send("hello").text()


def _blocking_unary(client: Client) -> None:
    client.get_request("0" * 32)


async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
    if request.text == "half":
        yield accepted()
        yield delta(0, "a")
    raise REFUSAL


@pytest.fixture
async def address() -> AsyncIterator[str]:
    service = FakeInferenceService()
    service.generate = [generate]
    service.converse = then_raise(REFUSAL)
    service.unary = {"GetRequest": REFUSAL}
    bound, address = await start_fake(service)
    yield address
    await bound.server.stop(None)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The next collection may be minutes away."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def _assert_no_connection(address: str) -> None:
    port = int(address.rpartition(":")[2])
    await wait_until(lambda: num_connections_to(os.getpid(), port) == 0, "the client's connection is closed")


@pytest.mark.parametrize("call", [_stream, _half_a_stream, _turn, _unary])
async def test_a_kept_error_keeps_no_connection(
    address: str, uncollected: None, call: Callable[[AsyncClient], Coroutine[Any, Any, None]]
) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(errors.InvalidRequestError) as kept:
            await call(client)
        assert num_connections_to(os.getpid(), int(address.rpartition(":")[2])) > 0
    await _assert_no_connection(address)
    assert kept.value.message == REFUSAL.message


@pytest.mark.parametrize("call", [_blocking_stream, _blocking_turn, _blocking_unary])
async def test_an_error_of_the_blocking_client_keeps_no_connection(
    address: str, uncollected: None, call: Callable[[Client], None]
) -> None:
    def fails() -> errors.KvrelayError:
        with Client(address) as client, pytest.raises(errors.InvalidRequestError) as kept:
            call(client)
        return kept.value

    kept = await asyncio.to_thread(fails)
    await _assert_no_connection(address)
    assert kept.message == REFUSAL.message
