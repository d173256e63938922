"""A gateway under the test's control: one session with one worker, commands out, events in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from kvrelay.core.job import JobId
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, session_pb2
from kvrelay.wire.convert import job_id_to_pb

EVENT_TIMEOUT_S = 30.0


class ScriptedSession:
    """One session; `hello` is the worker's."""

    def __init__(self, call: Any, request_type: Any) -> None:
        self._call = call
        self._request_type = request_type
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._kept: list[Any] = []
        self.hello = session_pb2.WorkerHello()
        self.load = session_pb2.WorkerLoad()
        self.answers_heartbeats = True
        self.num_heartbeats = 0

    async def greet(self, window_ms: int, gateway_id: str = "g", protocol_version: int = PROTOCOL_VERSION) -> None:
        hello = session_pb2.GatewayHello(
            gateway_id=gateway_id, protocol_version=protocol_version, liveness_window_ms=window_ms
        )
        await self.send(hello=hello)
        response = await self._call.read()
        if response is grpc.aio.EOF:
            raise AssertionError(f"no greeting: {await self._call.code()} {await self._call.details()}")
        self.hello = response.hello
        self.load = response.load

    async def send(self, **message: Any) -> None:
        await self._call.write(self._request_type(**message))

    async def cancel_job(self, job_id: JobId) -> None:
        await self.send(cancel_job=session_pb2.CancelJob(job_id=job_id_to_pb(job_id)))

    async def read_all(self) -> None:
        while (response := await self._call.read()) is not grpc.aio.EOF:
            self.load = response.load
            name = response.WhichOneof("message")
            if name == "heartbeat":
                self.num_heartbeats += 1
                self._events.put_nowait((None, response))  # for its load
                if self.answers_heartbeats:
                    await self.send(heartbeat_ack=session_pb2.HeartbeatAck(number=response.heartbeat.number))
            else:
                self._events.put_nowait((name, response))

    async def expect(self, name: str) -> Any:
        """Returns the next event of that name and keeps other events for later calls."""
        for position, (kept_name, response) in enumerate(self._kept):
            if kept_name == name:
                del self._kept[position]
                return getattr(response, name)
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while True:
                event_name, response = await self._events.get()
                if event_name == name:
                    return getattr(response, name)
                self._kept.append((event_name, response))

    async def expect_load(self, **values: object) -> None:
        """Waits for a load with these values, in any event."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            while any(getattr(self.load, name) != value for name, value in values.items()):
                self._kept.append(await self._events.get())

    def seen(self) -> list[str]:
        """Names of events that no test has expected."""
        while not self._events.empty():
            self._kept.append(self._events.get_nowait())
        return [name for name, _ in self._kept if name is not None]

    async def status(self) -> grpc.StatusCode:
        """What the session ended with."""
        async with asyncio.timeout(EVENT_TIMEOUT_S):
            code = await self._call.code()
            assert isinstance(code, grpc.StatusCode)
            return code

    async def collect_tokens(self, job_id: JobId, sequence: int, first: list[int] | None = None) -> list[int]:
        """All token ids of a sequence to its finish reason; checks that indexes are consecutive."""
        token_ids = list(first or [])
        while True:
            output = await self.expect("step_output")
            for token in output.tokens:
                if (token.job_id, token.sequence) != (job_id_to_pb(job_id), sequence):
                    continue
                assert token.index == len(token_ids)
                token_ids.append(token.token.token_id)
                if token.finish_reason:
                    return token_ids


@asynccontextmanager
async def session_with(
    role: str,
    address: str,
    window_ms: int = 5000,
    gateway_id: str = "g",
    credentials: ChannelCredentials | None = None,
) -> AsyncIterator[ScriptedSession]:
    """Opens a session with a worker; leaving the block breaks it."""
    channel = create_channel(address, credentials=credentials)
    if role == "decode":
        session = ScriptedSession(
            decode_pb2_grpc.DecodeServiceStub(channel).Session(), decode_pb2.DecodeServiceSessionRequest
        )
    else:
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Session()
        session = ScriptedSession(call, prefill_pb2.PrefillServiceSessionRequest)
    reader: asyncio.Task[None] | None = None
    try:
        await session.greet(window_ms, gateway_id)
        reader = asyncio.create_task(session.read_all())
        yield session
    finally:
        session._call.cancel()
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])
            if not reader.cancelled():
                reader.exception()
        await channel.close()
