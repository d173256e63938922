"""The gateway's end of one session stream with one worker: greeting, liveness, commands out, events in. Knows no request."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import structlog

from gateway import session_messages
from gateway.prompt_placement import SentPrompts
from gateway.router import WorkerView
from gateway.session_messages import SessionRequest, SessionResponse, WorkerIdentity
from gateway.worker_intake import WorkerIntake
from kvrelay.errors import UnavailableError
from kvrelay.liveness import PROTOCOL_VERSION, Liveness
from kvrelay.v1 import decode_pb2_grpc, prefill_pb2_grpc, session_pb2
from kvrelay.wire import load_from_pb
from kvrelay.work import WorkerLoad
from kvrelay.worker_registry import MemberRole

MAX_QUEUED_COMMANDS = 4096
HELLO_TIMEOUT_S = 5.0
LAST_READS_TIMEOUT_S = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What all sessions of a gateway have in common."""

    gateway_id: str
    liveness_window_ms: int


class WorkerSession:
    """One stream, from greeting to loss. Not reused: a new stream is a new session, and all work of the old one is gone.

    Args:
        role: which service to call.
        address: host:port.
        channel: to that address.
        settings: of the gateway.
        on_event: called with every message of the worker after its hello; must not raise.
    """

    def __init__(
        self,
        role: MemberRole,
        address: str,
        channel: grpc.aio.Channel,
        settings: SessionSettings,
        on_event: Callable[[WorkerSession, SessionResponse], None],
    ) -> None:
        self.role = role
        self.address = address
        self.channel = channel
        self.sent_prompts = SentPrompts()
        self.intake = WorkerIntake()
        self._load: WorkerLoad | session_pb2.WorkerLoad = WorkerLoad()
        self._identity: WorkerIdentity | None = None
        self._settings = settings
        self._on_event = on_event
        self._outbox: asyncio.Queue[SessionRequest] = asyncio.Queue(MAX_QUEUED_COMMANDS)
        self._liveness = Liveness(settings.liveness_window_ms, _now())
        self._num_assigned = 0
        self._num_assigned_tokens = 0
        self._overflown = asyncio.Event()
        self._is_lost = False
        """Nothing can be sent any more: what the worker still says is read and counts for nothing."""
        self.died = False
        """Whether the session ended by its stream breaking: neither by silence nor by the worker's own end."""

    @property
    def identity(self) -> WorkerIdentity:
        """What the worker said of itself; only after `greet`."""
        assert self._identity is not None, "greeted first"
        return self._identity

    @property
    def load(self) -> WorkerLoad:
        """As of the worker's last message; converted only when asked for, since it rides on every step."""
        if not isinstance(self._load, WorkerLoad):
            self._load = load_from_pb(self._load)
        return self._load

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    @property
    def silent_ms(self) -> float:
        """Milliseconds since the worker's last message."""
        return self._liveness.silent_ms(_now())

    def view(self) -> WorkerView:
        """What the router needs to know."""
        who = self.identity
        return WorkerView(
            who.worker_id,
            self.role,
            self.address,
            who.model,
            who.block_size,
            who.max_sequence_tokens,
            self.load,
            self._num_assigned,
            self._num_assigned_tokens,
        )

    def note_assigned(self, num_tokens: int) -> None:
        """A work goes to the worker; its next load report will count it."""
        self._num_assigned += 1
        self._num_assigned_tokens += num_tokens

    def send(self, request: SessionRequest) -> None:
        """Queues a command. A worker that lets commands pile up is lost."""
        try:
            self._outbox.put_nowait(request)
        except asyncio.QueueFull:
            self._overflown.set()

    async def run(self, on_greeted: Callable[[WorkerSession], None]) -> str:
        """Greets and serves until the session ends.

        Args:
            on_greeted: called once the worker has said who it is.

        Returns:
            Why it ended, for a person.

        Raises:
            UnavailableError: the worker did not answer the greeting, or speaks another protocol version.
        """
        call = self._open_call()
        # Not `call.read()`: that stops at a write that has failed, and a call with unread messages never ends.
        responses = aiter(call)
        try:
            self._identity = await self._greet(call, responses)
            on_greeted(self)
            return await self._serve(call, responses)
        finally:
            call.cancel()

    def _open_call(self) -> Any:
        if self.role is MemberRole.DECODE:
            return decode_pb2_grpc.DecodeServiceStub(self.channel).Session()
        return prefill_pb2_grpc.PrefillServiceStub(self.channel).Session()

    async def _greet(self, call: Any, responses: AsyncIterator[Any]) -> WorkerIdentity:
        greeting = session_messages.hello(self.role, self._settings.gateway_id, self._settings.liveness_window_ms)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await call.write(greeting)
                response = await anext(responses, None)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as failure:
            raise UnavailableError(f"no session with {self.address}: {_reason(failure)}") from failure
        if response is None or response.WhichOneof("message") != "hello":
            raise UnavailableError(f"{self.address} did not answer the greeting")
        identity = session_messages.identity(response.hello)
        if identity.protocol_version != PROTOCOL_VERSION:
            raise UnavailableError(f"{self.address} speaks protocol version {identity.protocol_version}, not {PROTOCOL_VERSION}")
        self._note_received(response)
        return identity

    async def _serve(self, call: Any, responses: AsyncIterator[Any]) -> str:
        receiving = asyncio.create_task(self._receive(responses), name=f"receive from {self.address}")
        tasks = [
            receiving,
            asyncio.create_task(self._send_queued(call), name=f"send to {self.address}"),
            asyncio.create_task(self._watch(), name=f"watch {self.address}"),
            asyncio.create_task(self._fail_on_overflow(), name=f"outbox of {self.address}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason = next(task.result() for task in tasks if task in done)
            if call.done():  # so cancelling it does nothing, and it ends by being read
                self._is_lost = True
                await asyncio.wait([receiving], timeout=LAST_READS_TIMEOUT_S)
            return receiving.result() if receiving.done() else reason
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, responses: AsyncIterator[Any]) -> str:
        try:
            async for response in responses:
                if self._is_lost:
                    continue
                self._note_received(response)
                self._answer_heartbeat(response)
                self._on_event(self, response)
        except grpc.aio.AioRpcError as failure:
            self.died = failure.code() is grpc.StatusCode.UNAVAILABLE
            return _reason(failure)
        return "the worker ended the session"

    def _note_received(self, response: SessionResponse) -> None:
        self._liveness.received(_now())
        if response.HasField("load"):
            self._load = response.load
            self._num_assigned = self._num_assigned_tokens = 0

    def _answer_heartbeat(self, response: SessionResponse) -> None:
        if response.WhichOneof("message") == "heartbeat":
            self.send(session_messages.heartbeat_ack(self.role, response.heartbeat.number))

    async def _send_queued(self, call: Any) -> str:
        try:
            while True:
                await call.write(await self._outbox.get())
                self._liveness.sent(_now())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as failure:
            return _reason(failure)

    async def _watch(self) -> str:
        while not self._liveness.lost(_now()):
            number = self._liveness.heartbeat_due(_now())
            if number is not None:
                self.send(session_messages.heartbeat(self.role, number))
            await asyncio.sleep(self._liveness.interval_s)
        return f"silent for {self._liveness.silent_ms(_now()):.0f} ms"

    async def _fail_on_overflow(self) -> str:
        await self._overflown.wait()
        return f"it left {MAX_QUEUED_COMMANDS} commands unread"

    def mark_draining(self) -> None:
        """The worker refuses new work; its next load report says the same."""
        self._load = replace(self.load, draining=True)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _reason(failure: BaseException) -> str:
    if isinstance(failure, grpc.aio.AioRpcError):
        return f"{failure.code().name}: {failure.details()}"
    return type(failure).__name__
