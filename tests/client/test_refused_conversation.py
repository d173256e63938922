"""A conversation tells why the gateway ended it, however early that is."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.errors import KvrelayError, OverloadedError, UnavailableError
from kvrelay.network import rpc
from kvrelay.testing.process_files import num_connections_to
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from tests.support.fake_inference_service import accepted, delta, finished

NUM_CONVERSATIONS = 200
"""The refusal comes before, while and after gRPC writes."""


class RefusingService(inference_pb2_grpc.InferenceServiceServicer):
    """Answers `num_turns` turns, then ends the call before it reads another."""

    def __init__(self) -> None:
        self.num_turns = 0
        self.end: KvrelayError | None = OverloadedError("no place", 1000)

    async def Converse(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(self.num_turns):
            await anext(request_iterator)
            yield inference_pb2.ConverseResponse(accepted=accepted())
            yield inference_pb2.ConverseResponse(delta=delta(0, "a", last=True))
            yield inference_pb2.ConverseResponse(finished=finished(num_tokens=1))
        if self.end is not None:
            raise self.end


@pytest.fixture
async def refusing() -> AsyncIterator[tuple[RefusingService, str]]:
    service = RefusingService()  # type: ignore[abstract]
    server = rpc.create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


async def _refusal(client: AsyncClient, number: int, num_turns: int, error: type[KvrelayError]) -> str:
    """Its message, behind `num_turns` answers."""
    async with client.converse() as conversation:
        for _ in range(number % 20):
            await asyncio.sleep(0)  # lets the refusal come nearer to the write
        for _ in range(num_turns):
            assert await conversation.send("hello").text() == "a"
        with pytest.raises(error) as refusal:
            await conversation.send("hello").text()
    return refusal.value.message


@pytest.mark.parametrize("num_turns", [0, 1])
async def test_a_refused_conversation_shows_the_gateways_reason(
    refusing: tuple[RefusingService, str], num_turns: int
) -> None:
    service, address = refusing
    service.num_turns = num_turns
    async with AsyncClient(address, timeout_s=60) as client:
        for number in range(NUM_CONVERSATIONS):
            assert await _refusal(client, number, num_turns, OverloadedError) == "no place"


async def test_refusals_that_are_kept_keep_no_connection(refusing: tuple[RefusingService, str]) -> None:
    _, address = refusing
    gc.collect()
    gc.disable()
    try:
        async with AsyncClient(address, timeout_s=60) as client:
            for number in range(NUM_CONVERSATIONS):
                await _refusal(client, number, 0, OverloadedError)
        port = int(address.rpartition(":")[2])
        await wait_until(lambda: num_connections_to(os.getpid(), port) == 0, "the client's connection is closed")
    finally:
        gc.enable()


async def test_a_conversation_that_the_gateway_just_ends_says_so(refusing: tuple[RefusingService, str]) -> None:
    service, address = refusing
    service.num_turns, service.end = 1, None
    async with AsyncClient(address, timeout_s=60) as client:
        for number in range(NUM_CONVERSATIONS):
            message = await _refusal(client, number, 1, UnavailableError)
            assert message == "the conversation ended before the turn's last message"


async def test_the_blocking_client_shows_the_gateways_reason_too(refusing: tuple[RefusingService, str]) -> None:
    _, address = refusing

    def ask() -> None:
        with Client(address, timeout_s=60) as client:
            for _ in range(NUM_CONVERSATIONS):
                with client.converse() as conversation, pytest.raises(OverloadedError, match="no place"):
                    conversation.send("hello").text()

    await asyncio.to_thread(ask)
