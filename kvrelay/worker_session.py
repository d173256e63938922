"""The worker's end of one session stream with one gateway: greeting, liveness, commands in, events out. Knows no request.

Both kinds of worker have sessions of their own messages, which share the names of what is handled here: hello, heartbeat,
heartbeat_ack and load.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import structlog

from kvrelay.errors import DeadlineError, InvalidRequestError, PreconditionError, UnavailableError
from kvrelay.liveness import PROTOCOL_VERSION, Liveness
from kvrelay.v1 import session_pb2

MAX_QUEUED_MESSAGES = 4096
HELLO_TIMEOUT_S = 5.0
MIN_WINDOW_MS = 100
MAX_WINDOW_MS = 60_000

_log = structlog.get_logger(__name__)


class MakeResponse(Protocol):
    """Makes a response of the session's service: one of its messages, with the load of now."""

    def __call__(self, **message: Any) -> Any: ...


class WorkerSession:
    """One stream, from greeting to loss.

    Args:
        context: of the call.
        hello: who the worker is.
        make_response: of the service whose session it is.
        on_command: called with the name and the value of every message that is not handled here.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        hello: session_pb2.WorkerHello,
        make_response: MakeResponse,
        on_command: Callable[[WorkerSession, str, Any], None],
    ) -> None:
        self._context = context
        self._hello = hello
        self._make_response = make_response
        self._on_command = on_command
        self._outbox: asyncio.Queue[Any] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._overflown = asyncio.Event()
        self._liveness = Liveness(MIN_WINDOW_MS, _now())
        self._window_s = 0.0
        self.gateway_id = ""

    def send(self, **message: Any) -> None:
        """Queues an event. A gateway that lets events pile up is lost."""
        try:
            self._outbox.put_nowait(self._make_response(**message))
        except asyncio.QueueFull:
            self._overflown.set()

    async def greet(self) -> None:
        """Reads the gateway's greeting and answers it.

        Raises:
            PreconditionError: the gateway speaks another protocol version.
        """
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                request = await self._context.read()
        except TimeoutError:
            raise DeadlineError(f"no greeting came within {HELLO_TIMEOUT_S:g} s") from None
        if request is grpc.aio.EOF or request.WhichOneof("message") != "hello":
            raise InvalidRequestError("message", "must be a hello where a session begins")
        if request.hello.protocol_version != PROTOCOL_VERSION:
            raise PreconditionError(
                f"the gateway speaks session protocol {request.hello.protocol_version}, this worker {PROTOCOL_VERSION};"
                " run the same version of kvrelay on both"
            )
        self.gateway_id = request.hello.gateway_id
        window_ms = min(max(request.hello.liveness_window_ms, MIN_WINDOW_MS), MAX_WINDOW_MS)
        self._window_s = window_ms / 1000
        self._liveness = Liveness(window_ms, _now())
        await self._write(self._make_response(hello=self._hello))

    async def serve(self, ended: asyncio.Event) -> None:
        """Serves until the gateway ends the session, or the worker does by setting `ended`.

        Raises:
            UnavailableError: the gateway fell silent, or does not read.
        """
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._read_all(), name="session reader"),
            asyncio.create_task(self._write_all(), name="session writer"),
            asyncio.create_task(self._watch(), name="session watch"),
            asyncio.create_task(ended.wait(), name="session end"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_until_sent(self) -> None:
        """Returns when all queued events are written. The caller bounds it."""
        await self._outbox.join()

    async def _read_all(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            self._liveness.received(_now())
            name = request.WhichOneof("message")
            if name == "heartbeat":
                self.send(heartbeat_ack=session_pb2.HeartbeatAck(number=request.heartbeat.number))
            elif name is not None and name != "heartbeat_ack":
                self._on_command(self, name, getattr(request, name))

    async def _write_all(self) -> None:
        while True:
            await self._write(await self._outbox.get())
            self._outbox.task_done()

    async def _write(self, response: Any) -> None:
        try:
            async with asyncio.timeout(self._window_s):
                await self._context.write(response)
        except TimeoutError:
            raise UnavailableError("the gateway does not read its session") from None
        self._liveness.sent(_now())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._liveness.interval_s)
            now = _now()
            if self._overflown.is_set():
                raise UnavailableError(f"the gateway let {MAX_QUEUED_MESSAGES} events pile up")
            if self._liveness.lost(now):
                raise UnavailableError(f"the gateway was silent for {self._liveness.silent_ms(now):.0f} ms")
            number = self._liveness.heartbeat_due(now)
            if number is not None and self._outbox.empty():
                self.send(heartbeat=session_pb2.Heartbeat(number=number))


def _now() -> float:
    return asyncio.get_running_loop().time()
