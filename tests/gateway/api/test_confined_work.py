"""Formats and chats of a real gateway go through children that it starts, counts and ends."""

import asyncio
import os
from typing import Any

import aiohttp
import grpc
import pytest

from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from tests.gateway.conftest import Bench, Gateway, read_all, token_request
from tests.security.format_bombs import BOMBS

PROMPT = list(range(10, 50))
GOOD = session_pb2.ResponseFormat(regex="yes|no")
BOMB = session_pb2.ResponseFormat(json_schema=BOMBS["allOf of patterns"].source)


def request_with(response_format: session_pb2.ResponseFormat) -> pb.GenerateRequest:
    fields: dict[str, Any] = {"sampling_ignore_eos": False, "sampling_response_format": response_format}
    return token_request(PROMPT, 4, **fields)


async def samples(gateway: Gateway) -> dict[str, float]:
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.http_url}/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return set(file.read().split())


async def test_a_bomb_is_refused_by_name_while_another_callers_format_is_served(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway(http=True)
    before = children()
    refused = asyncio.ensure_future(read_all(gateway.stub.Generate(request_with(BOMB))))
    answer = await read_all(gateway.stub.Generate(request_with(GOOD)))
    assert answer.finished is not None
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await refused
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = refusal.value.details() or ""
    assert details.startswith("sampling.response_format.json_schema takes more than 2 s of processor time")
    assert "make it simpler" in details
    counted = await samples(gateway)
    assert counted['kvrelay_response_formats_total{outcome="time"}'] == 1
    assert counted['kvrelay_response_formats_total{outcome="accepted"}'] == 1
    assert counted['kvrelay_confined_children_started_total{work="format"}'] >= 2
    await gateway.stop()
    assert children() <= before, "no child outlives its gateway"
    await bench.at_rest()


async def test_chats_are_rendered_by_a_child(bench: Bench) -> None:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway(http=True)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello")])
    for _ in range(2):
        await read_all(gateway.stub.Generate(pb.GenerateRequest(chat=chat)))
    counted = await samples(gateway)
    assert counted['kvrelay_chats_rendered_total{outcome="rendered"}'] == 2
    assert counted['kvrelay_confined_children_started_total{work="chat"}'] == 1
    assert counted['kvrelay_confined_children_started_total{work="format"}'] == 0
