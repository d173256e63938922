"""A server without a gateway for `bench relay`: it writes the messages that a gateway would write,
and does nothing else.

What it takes for a message is what grpc.aio takes; a gateway can only take more. For a process of
its own.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc

from kvrelay.network.rpc import create_server
from kvrelay.runtime import event_loop
from kvrelay.v1 import inference_pb2, session_pb2

SETTLE_S = 0.2
"""What opening the streams left to be done is not measured."""


@dataclass(frozen=True, slots=True)
class FloorPlan:
    """What is written: `num_tokens` to each stream in single-token messages.

    interval_s: between two steps of a group of streams; None: as fast as the client reads.
    """

    num_streams: int
    num_groups: int
    num_tokens: int
    interval_s: float | None
    cores: frozenset[int]


@dataclass(frozen=True, slots=True)
class FloorRecord:
    """`sent_times_s`: of each stream's id, by token index, in monotonic seconds. `begin_s` is when
    the first step was.
    """

    sent_times_s: dict[str, list[float]]
    begin_s: float
    cpu_s: float


def run_floor(plan: FloorPlan, connection: Connection) -> None:
    """Sends its port, and a FloorRecord once all streams are written. Ends when it is told to."""
    os.sched_setaffinity(0, plan.cores)
    event_loop.run(_FloorServer(plan).serve(connection))


class _Stream:
    """One stream's messages that are not written yet."""

    def __init__(self, number: int) -> None:
        self.request_id = str(number)
        self.sent_times_s: list[float] = []
        self._unwritten: list[bytes] = []
        self._woken: asyncio.Future[None] | None = None

    def put(self, message: bytes, now: float) -> None:
        self.sent_times_s.append(now)
        self._unwritten.append(message)
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def take(self) -> list[bytes]:
        if not self._unwritten:
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        taken, self._unwritten = self._unwritten, []
        return taken


class _FloorServer:
    def __init__(self, plan: FloorPlan) -> None:
        self._plan = plan
        self._streams: list[_Stream] = []
        self._opened = asyncio.Semaphore(0)

    async def serve(self, connection: Connection) -> None:
        server = create_server()
        handler: Any = grpc.unary_stream_rpc_method_handler(self._generate, response_serializer=lambda message: message)
        service = grpc.method_handlers_generic_handler("kvrelay.v1.InferenceService", {"Generate": handler})
        server.add_generic_rpc_handlers((service,))
        connection.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        for _ in range(self._plan.num_streams):
            await self._opened.acquire()
        await asyncio.sleep(SETTLE_S)
        begin_s, begin_cpu_s = time.monotonic(), time.process_time()
        await self._run_steps()
        await asyncio.to_thread(connection.recv)  # the client has all
        sent_times_s = {stream.request_id: stream.sent_times_s for stream in self._streams}
        connection.send(FloorRecord(sent_times_s, begin_s, time.process_time() - begin_cpu_s))
        await server.stop(0)

    async def _run_steps(self) -> None:
        groups = [self._streams[number :: self._plan.num_groups] for number in range(self._plan.num_groups)]
        next_s = time.monotonic()
        for index in range(self._plan.num_tokens):
            token = session_pb2.Token(token_id=300 + index % 8192)
            delta = inference_pb2.Delta(index=index, tokens=[token], text=" token")
            message = inference_pb2.GenerateResponse(delta=delta).SerializeToString()
            for group in groups:
                now = time.monotonic()
                for stream in group:
                    stream.put(message, now)
                if self._plan.interval_s is not None:
                    next_s += self._plan.interval_s / len(groups)
                    await asyncio.sleep(max(next_s - time.monotonic(), 0))

    async def _generate(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        stream = _Stream(len(self._streams))
        self._streams.append(stream)
        accepted = inference_pb2.Accepted(request_id=stream.request_id)
        await context.write(inference_pb2.GenerateResponse(accepted=accepted).SerializeToString())
        self._opened.release()
        num_written = 0
        while num_written < self._plan.num_tokens:
            for message in await stream.take():
                await context.write(message)
                num_written += 1
        await context.write(inference_pb2.GenerateResponse(finished=inference_pb2.Finished()).SerializeToString())
