"""The gateway's end of one session: handshake, liveness, commands, events."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import structlog

from gateway.routing.circuit_breaker import WorkerCircuitBreaker
from gateway.routing.conditional_disaggregation import InFlightPrompts, without_rates
from gateway.routing.handoff_costs import LIFETIME_S, HandoffCosts
from gateway.routing.router import WorkerView
from gateway.workers import session_messages
from gateway.workers.session_messages import SessionRequest, SessionResponse, WorkerIdentity
from kvrelay.core.job import WorkerLoad
from kvrelay.core.liveness import HELLO_TIMEOUT_S, PROTOCOL_VERSION, Liveness
from kvrelay.core.member import MemberRole
from kvrelay.errors import InvalidRequestError, UnavailableError
from kvrelay.network.first_status import FirstStatus
from kvrelay.security.cluster_key import Challenge, WorkerProof
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.security.principal import Role
from kvrelay.v1 import decode_pb2_grpc, prefill_pb2_grpc, session_pb2
from kvrelay.wire.convert import load_from_pb

MAX_QUEUED_COMMANDS = 4096
LAST_READS_TIMEOUT_S = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    gateway_id: str
    liveness_window_ms: int
    move_ms: int = 300_000
    """How long a busy session may keep changed certificates."""
    wants_cache_changes: bool = False
    takes_unproven: bool = False
    """Workers without the cluster's key."""


class UntrustedWorkerError(Exception):
    pass


class WorkerSession:
    """One stream. Its jobs end with it.

    `on_event` gets every message after the worker's hello; must not raise.
    """

    def __init__(
        self,
        role: MemberRole,
        address: str,
        channel: grpc.aio.Channel,
        settings: SessionSettings,
        on_event: Callable[[WorkerSession, SessionResponse], None],
        credentials: ChannelCredentials | None = None,
    ) -> None:
        self.role = role
        self.address = address
        self.channel = channel
        self.in_flight_prompts = InFlightPrompts()
        self.handoff_costs = HandoffCosts()
        self._rates_at = _now()
        """When a step last changed what the worker has computed."""
        self.circuit_breaker = WorkerCircuitBreaker(random.random)
        self._load: WorkerLoad | session_pb2.WorkerLoad = WorkerLoad()
        self._identity: WorkerIdentity | None = None
        self._settings = settings
        self._on_event = on_event
        self._challenge: Challenge | None = None
        if credentials is not None and not settings.takes_unproven:
            self._challenge = credentials.challenge(Role(role.value), address)
        self._outbox: asyncio.Queue[SessionRequest] = asyncio.Queue(MAX_QUEUED_COMMANDS)
        self._liveness = Liveness(settings.liveness_window_ms, _now())
        self._num_assigned = 0
        self._num_assigned_tokens = 0
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._is_lost = False
        """The call is done. It ends only once all messages are read."""
        self.died = False
        """The stream broke, as in a crash."""

    @property
    def identity(self) -> WorkerIdentity:
        """Set by the handshake."""
        assert self._identity is not None, "after the handshake"
        return self._identity

    @property
    def load(self) -> WorkerLoad:
        """Converted on demand, because each step reports one."""
        if not isinstance(self._load, WorkerLoad):
            self._load = load_from_pb(self._load)
        return self._load

    def expected_load(self) -> WorkerLoad:
        """Without rates that are too old."""
        load = self.in_flight_prompts.expected_load(self.load)
        return load if _now() - self._rates_at <= LIFETIME_S else without_rates(load)

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    @property
    def silent_ms(self) -> float:
        return self._liveness.silent_ms(_now())

    def view(self) -> WorkerView:
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

    def count_assigned(self, num_tokens: int) -> None:
        """Counts a job until the next load report."""
        self._num_assigned += 1
        self._num_assigned_tokens += num_tokens

    def send(self, request: SessionRequest) -> None:
        """A full queue ends the session."""
        try:
            self._outbox.put_nowait(request)
        except asyncio.QueueFull:
            self.end(f"it left {MAX_QUEUED_COMMANDS} commands unread")

    def end(self, reason: str) -> None:
        """The session's jobs go elsewhere."""
        if not self._ended.done():
            self._ended.set_result(reason)

    @property
    def is_idle(self) -> bool:
        """As far as is known."""
        return not (self.load.num_running or self.load.num_waiting or self._num_assigned)

    async def run(self, on_connected: Callable[[WorkerSession], None]) -> str:
        """Returns why the session ended, in words.

        Raises:
            UnavailableError: the handshake failed.
            UntrustedWorkerError: the worker has not met the challenge.
        """
        call = self._open_call()
        # `call.read()` stops at a failed write, and a call with unread messages never ends.
        responses, status = aiter(call), FirstStatus(call)
        try:
            self._identity = await self._handshake(call, responses, status)
            on_connected(self)
            return await self._serve(call, responses, status)
        finally:
            call.cancel()

    def _open_call(self) -> Any:
        if self.role is MemberRole.DECODE:
            return decode_pb2_grpc.DecodeServiceStub(self.channel).Session()
        return prefill_pb2_grpc.PrefillServiceStub(self.channel).Session()

    async def _handshake(self, call: Any, responses: AsyncIterator[Any], status: FirstStatus) -> WorkerIdentity:
        asked = self._settings
        greeting = session_messages.hello(
            self.role,
            asked.gateway_id,
            asked.liveness_window_ms,
            self._challenge,
            wants_cache_changes=asked.wants_cache_changes,
        )
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await call.write(greeting)
                response = await anext(responses, None)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as failure:
            raise UnavailableError(f"no session with {self.address}: {_reason(status.cause_of(failure))}") from failure
        if response is None or response.WhichOneof("message") != "hello":
            raise UnavailableError(f"{self.address} did not answer the greeting")
        try:
            identity = session_messages.identity(response.hello)
        except InvalidRequestError as failure:
            raise UnavailableError(f"{self.address} sent no greeting of a worker: {failure.message}") from failure
        if identity.protocol_version != PROTOCOL_VERSION:
            raise UnavailableError(
                f"{self.address} speaks protocol version {identity.protocol_version}, not {PROTOCOL_VERSION}"
            )
        proof = WorkerProof(response.hello.nonce, response.hello.proof)
        if self._challenge is not None and not self._challenge.is_met_by(proof):
            raise UntrustedWorkerError(
                f"{self.address} does not prove that it has the cluster's key, so it gets nothing; see which process "
                "listens there, and upgrade it if it is a worker of an older version"
            )
        self._on_received(response)
        return identity

    async def _serve(self, call: Any, responses: AsyncIterator[Any], status: FirstStatus) -> str:
        receiving = asyncio.create_task(self._receive(responses, status), name=f"receive from {self.address}")
        tasks = [
            receiving,
            asyncio.create_task(self._send_queued(call, status), name=f"send to {self.address}"),
            asyncio.create_task(self._watch(), name=f"watch {self.address}"),
            asyncio.create_task(self._until_ended(), name=f"end of the session with {self.address}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason = next(task.result() for task in tasks if task in done)
            if call.done():  # then cancelling has no effect, and only reading ends it
                self._is_lost = True
                await asyncio.wait([receiving], timeout=LAST_READS_TIMEOUT_S)
            return receiving.result() if receiving.done() else reason
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, responses: AsyncIterator[Any], status: FirstStatus) -> str:
        try:
            async for response in responses:
                if self._is_lost:
                    continue
                self._on_received(response)
                self._answer_heartbeat(response)
                self._on_event(self, response)
        except grpc.aio.AioRpcError as failure:
            cause = status.cause_of(failure)
            self.died = isinstance(cause, grpc.aio.AioRpcError) and cause.code() is grpc.StatusCode.UNAVAILABLE
            return _reason(cause)
        return _reason(None)

    def _on_received(self, response: SessionResponse) -> None:
        self._liveness.received(_now())
        if response.HasField("load"):
            if response.load.num_computed_prompt_tokens != self._load.num_computed_prompt_tokens:
                self._rates_at = _now()
            self._load = response.load
            self._num_assigned = self._num_assigned_tokens = 0

    def _answer_heartbeat(self, response: SessionResponse) -> None:
        if response.WhichOneof("message") == "heartbeat":
            self.send(session_messages.heartbeat_ack(self.role, response.heartbeat.number))

    async def _send_queued(self, call: Any, status: FirstStatus) -> str:
        try:
            while True:
                await call.write(await self._outbox.get())
                self._liveness.sent(_now())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as failure:
            return _reason(status.cause_of(failure))

    async def _watch(self) -> str:
        while not self._liveness.lost(_now()):
            number = self._liveness.heartbeat_due(_now())
            if number is not None:
                self.send(session_messages.heartbeat(self.role, number))
            await asyncio.sleep(self._liveness.interval_s)
        return f"silent for {self._liveness.silent_ms(_now()):.0f} ms"

    async def _until_ended(self) -> str:
        return await asyncio.shield(self._ended)

    def mark_draining(self) -> None:
        """Holds until the next load report."""
        self._load = replace(self.load, draining=True)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _reason(failure: BaseException | None) -> str:
    if failure is None:
        return "the worker ended the session"
    if isinstance(failure, grpc.aio.AioRpcError):
        return f"{failure.code().name}: {failure.details()}"
    return type(failure).__name__
