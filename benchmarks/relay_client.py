"""A process of clients for `bench relay`: opens streams and notes when each message came. Parses nothing until all is over."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay.rpc import create_channel
from kvrelay.v1 import inference_pb2, session_pb2

GENERATE = "/kvrelay.v1.InferenceService/Generate"
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What one process of clients is to do."""

    address: str
    num_streams: int
    max_tokens: int
    coalesce_ms: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """One Delta: when it came, in monotonic seconds of this host, and the tokens in it."""

    time_s: float
    index: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """One stream as its client saw it."""

    request_id: str
    messages: tuple[ReceivedMessage, ...]


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """What one process of clients saw, and the processor seconds that it took for it."""

    streams: tuple[StreamRecord, ...]
    cpu_s: float


def run_streams(plan: StreamPlan) -> ClientRecord:
    """Opens all streams at once, over one connection, and reads them to their ends. For a process of its own."""
    return asyncio.run(_run_streams(plan))


async def _run_streams(plan: StreamPlan) -> ClientRecord:
    begin_cpu_s = time.process_time()
    async with create_channel(plan.address) as channel:
        raw = await asyncio.gather(*(_read(channel, plan, number) for number in range(plan.num_streams)))
    cpu_s = time.process_time() - begin_cpu_s
    return ClientRecord(tuple(map(_parse, raw)), cpu_s)


async def _read(channel: grpc.aio.Channel, plan: StreamPlan, number: int) -> list[tuple[float, bytes]]:
    method: Any = channel.unary_stream(
        GENERATE, request_serializer=inference_pb2.GenerateRequest.SerializeToString, response_deserializer=None
    )
    call = method(_request(plan, number), timeout=plan.timeout_s)
    received: list[tuple[float, bytes]] = []
    while (message := await call.read()) is not grpc.aio.EOF:
        received.append((time.monotonic(), message))
    return received


def _request(plan: StreamPlan, number: int) -> inference_pb2.GenerateRequest:
    sampling = session_pb2.SamplingParams(temperature=0.0, max_tokens=plan.max_tokens, ignore_eos=True)
    prompt = [300 + (7 * number + place) % 8192 for place in range(PROMPT_TOKENS)]
    token_ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=token_ids, sampling=sampling, coalesce_ms=plan.coalesce_ms)


def _parse(received: list[tuple[float, bytes]]) -> StreamRecord:
    request_id = ""
    messages = []
    for time_s, data in received:
        frame = inference_pb2.GenerateResponse.FromString(data)
        if frame.HasField("accepted"):
            request_id = frame.accepted.request_id
        elif frame.HasField("delta"):
            messages.append(ReceivedMessage(time_s, frame.delta.index, len(frame.delta.tokens)))
    return StreamRecord(request_id, tuple(messages))
