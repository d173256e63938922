"""One session with one gateway: handshake, liveness, commands in, events out."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import structlog

from kvrelay.core.bounds import MAX_ADDRESS_BYTES, check_length
from kvrelay.core.liveness import HELLO_TIMEOUT_S, PROTOCOL_VERSION, Liveness
from kvrelay.errors import DeadlineError, InvalidRequestError, PreconditionError, UnavailableError
from kvrelay.kv_cache.cache_feed import CacheFeed
from kvrelay.security.cluster_key import ProveWorker, prove_nothing
from kvrelay.v1 import session_pb2
from kvrelay.wire.convert import cache_changes_to_pb

MAX_QUEUED_MESSAGES = 4096
MIN_WINDOW_MS = 100
MAX_WINDOW_MS = 60_000

_log = structlog.get_logger(__name__)


class MakeResponse(Protocol):
    """Adds the current load."""

    def __call__(self, **message: Any) -> Any: ...


class EventSink(Protocol):
    gateway_id: str

    def send(self, **message: Any) -> None:
        """Queues an event, under the name of its field."""


class GatewaySession:
    """`on_command` gets field name and value of every message not handled here."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        hello: session_pb2.WorkerHello,
        make_response: MakeResponse,
        on_command: Callable[[GatewaySession, str, Any], None],
        prove: ProveWorker = prove_nothing,
    ) -> None:
        self._context = context
        self._hello = hello
        self._make_response = make_response
        self._on_command = on_command
        self._prove = prove
        self._outbox: asyncio.Queue[Any] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._overflown = asyncio.Event()
        self._liveness = Liveness(MIN_WINDOW_MS, _now())
        self._window_s = 0.0
        self.gateway_id = ""
        self.wants_cache_changes = False
        self.cache_feed: CacheFeed | None = None
        """For gateways that want it."""

    def send(self, **message: Any) -> None:
        """A full queue ends the session."""
        try:
            self._outbox.put_nowait(self._make_response(**message))
        except asyncio.QueueFull:
            self._overflown.set()

    async def handshake(self) -> None:
        """Exchanges greetings.

        Raises:
            DeadlineError: no greeting came in time.
            InvalidRequestError: the first message is no right greeting.
            PreconditionError: the gateway speaks another protocol version.
            UnauthenticatedError: it dialled an address of others.
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
        self.gateway_id = _checked_gateway_id(request.hello.gateway_id)
        self.wants_cache_changes = request.hello.wants_cache_changes
        window_ms = min(max(request.hello.liveness_window_ms, MIN_WINDOW_MS), MAX_WINDOW_MS)
        self._window_s = window_ms / 1000
        self._liveness = Liveness(window_ms, _now())
        check_length("hello.dialled_address", request.hello.dialled_address, MAX_ADDRESS_BYTES)
        proof = self._prove(request.hello.nonce, request.hello.dialled_address)
        hello = session_pb2.WorkerHello(nonce=proof.nonce, proof=proof.digest)
        hello.MergeFrom(self._hello)
        await self._write(self._make_response(hello=hello))

    async def serve(self, ended: asyncio.Event) -> None:
        """Serves until the gateway ends the session or the worker sets `ended`.

        Raises:
            UnavailableError: the gateway was silent, or does not read.
            InvalidRequestError: a command has a text that no gateway sends.
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
        """The caller sets the timeout."""
        await self._outbox.join()

    async def _read_all(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            self._liveness.received(_now())
            name = request.WhichOneof("message")
            if name == "heartbeat":
                self.send(heartbeat_ack=session_pb2.HeartbeatAck(number=request.heartbeat.number))
            elif name is not None and name != "heartbeat_ack":
                command = getattr(request, name)
                _check_texts(name, command)
                self._on_command(self, name, command)

    async def _write_all(self) -> None:
        while True:
            if self._outbox.empty() and self.cache_feed is not None and self.cache_feed.has_news:
                await self._write(self._make_response())
            else:  # later changes travel with the next message
                await self._write(await self._outbox.get())
                self._outbox.task_done()

    async def _write(self, response: Any) -> None:
        if self.cache_feed is not None and self.cache_feed.has_news:
            response.cache_changes.CopyFrom(cache_changes_to_pb(self.cache_feed.take()))
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


def _check_texts(name: str, command: Any) -> None:
    """Before any is kept or logged."""
    for field, value in command.ListFields():
        if isinstance(value, str):
            check_length(f"{name}.{field.name}", value, MAX_ADDRESS_BYTES)
    if "job_id" in command.DESCRIPTOR.fields_by_name:
        check_length(f"{name}.job_id.request_id", command.job_id.request_id)


def _checked_gateway_id(gateway_id: str) -> str:
    check_length("hello.gateway_id", gateway_id)
    if not gateway_id or not gateway_id.isprintable():
        raise InvalidRequestError("hello.gateway_id", "must have printable characters, and at least one")
    return gateway_id


def _now() -> float:
    return asyncio.get_running_loop().time()
