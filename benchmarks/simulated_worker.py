"""A worker without a model, to measure what is around models: it speaks both session protocols and makes tokens from nothing.

One process is prefill and decode worker at once. A prompt takes no time, its KV is "pushed" by a call within the process, and a
step gives every running sequence one token, at a set interval or as fast as gateways read. When each step was sent is kept, so
that whoever knows a token's index knows when it left. Only the model is simulated: sessions, leases and messages are real.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from kvrelay.finish_rules import finish_reason
from kvrelay.liveness import PROTOCOL_VERSION
from kvrelay.model_service import TokenizerService
from kvrelay.model_spec import KVLayout, ModelSpec
from kvrelay.redis_connection import RedisConnection
from kvrelay.rpc import create_server
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, session_pb2, session_pb2_grpc
from kvrelay.wire import finish_reason_to_pb, model_to_pb, work_id_from_pb, work_id_to_pb
from kvrelay.work import FailureKind, Work, WorkerLoad, WorkId
from kvrelay.worker_registry import Member, MemberRole, WorkerRegistry
from kvrelay.worker_session import WorkerSession
from kvrelay.worker_sessions import WorkerSessions

BLOCK_SIZE = 16
MAX_SEQUENCE_TOKENS = 65_536
LEASE_MS = 6000
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 300, 8192
"""Tokens are words of the demo model's vocabulary, in a fixed order that does not repeat soon."""
TOKEN_ID_STRIDE = 2053

_FINGERPRINT = "5" * 32


def simulated_model(name: str = "simulated") -> ModelSpec:
    """What the workers say they serve."""
    return ModelSpec(name, "llama", KVLayout(1, 1, 1, "float32"), 49_152, MAX_SEQUENCE_TOKENS, (0,), _FINGERPRINT)


@dataclass(slots=True)
class _RunningWork:
    """A work in the batch. `message` is the next token of its one sequence, changed in place with every step."""

    work: Work
    message: session_pb2.SequenceToken
    num_tokens_left: int


class SimulatedWorker:
    """`async with SimulatedWorker(redis_url, folder).running() as worker:` serves and is registered under both roles.

    Args:
        redis_url: where to register.
        tokenizer_folder: of the model whose tokenizer gateways get.
        started: released once for every work that joins the batch.
        peers: all simulated workers by address, shared: where pushes go.
    """

    def __init__(
        self, redis_url: str, tokenizer_folder: Path, started: asyncio.Semaphore, peers: dict[str, SimulatedWorker]
    ) -> None:
        self.model = simulated_model()
        self.sent_times_s: dict[str, list[float]] = {}
        """Of each request, by token index: the monotonic second at which the token's step was handed to gRPC."""
        self._redis_url = redis_url
        self._tokenizer_folder = tokenizer_folder
        self._started = started
        self._peers = peers
        self._address = ""
        self._reserved: dict[WorkId, Work] = {}
        self._running: dict[WorkId, _RunningWork] = {}
        self._interval_s: float | None = None
        self._stepping = asyncio.Event()
        self._idle = asyncio.Event()
        self._worker_ids = {role: f"{role.value}-{secrets.token_hex(8)}" for role in (MemberRole.DECODE, MemberRole.PREFILL)}
        self._decode = self._make_sessions(MemberRole.DECODE, decode_pb2.DecodeServiceSessionResponse, self._forget)
        # What a prefill worker is told to give up, the decode worker is told too.
        self._prefill = self._make_sessions(MemberRole.PREFILL, prefill_pb2.PrefillServiceSessionResponse, lambda _: None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SimulatedWorker]:
        """Serves on a free port of the loopback interface."""
        server = create_server()
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(_DecodeService(self), server)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillService(self), server)
        session_pb2_grpc.add_ModelServiceServicer_to_server(TokenizerService(self._tokenizer_folder, _FINGERPRINT), server)
        self._address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        self._peers[self._address] = self
        await server.start()
        stepping = asyncio.create_task(self._run_steps(), name="steps")
        try:
            async with RedisConnection(self._redis_url) as connection, contextlib.AsyncExitStack() as leases:
                registry = WorkerRegistry(connection, LEASE_MS)
                for role, worker_id in self._worker_ids.items():
                    member = Member(worker_id, role, self._address, self.model.name, self.model.fingerprint)
                    await leases.enter_async_context(registry.lease(member))
                yield self
        finally:
            stepping.cancel()
            await asyncio.wait([stepping])
            await server.stop(0)

    @property
    def num_running(self) -> int:
        """Works in the batch."""
        return len(self._running)

    async def run_steps(self, interval_s: float | None) -> None:
        """Steps until nothing runs any more, once in so many seconds; None: as fast as gateways take them."""
        self._interval_s = interval_s
        self._idle.clear()
        self._stepping.set()
        await self._idle.wait()

    # --- commands of gateways ---------------------------------------------------------------------------------------------------

    async def serve(self, role: MemberRole, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One session."""
        await (self._decode if role is MemberRole.DECODE else self._prefill).serve(context, self._on_command)

    def _on_command(self, session: WorkerSession, name: str, message: Any) -> None:
        match name:
            case "reserve":
                self._reserve(session, message)
            case "start_prefill":
                self._run_prompt_and_push(session, message)
            case "run_prompt":
                work = self._reserved.pop(work_id_from_pb(message.work_id), None)
                if work is not None:
                    self._start(work, work.first_index, [])
            case "finish_sequence":
                self._forget(work_id_from_pb(message.work_id))
            case "cancel_work":
                work_id = work_id_from_pb(message.work_id)
                self._decode.cancel(session, work_id)
                self._prefill.cancel(session, work_id)

    def _reserve(self, session: WorkerSession, message: decode_pb2.Reserve) -> None:
        work = self._decode.admit(session, message)
        if work is None:
            return
        self._reserved[work.work_id] = work
        reserved = decode_pb2.Reserved(
            work_id=message.work_id, ticket=secrets.token_bytes(16), push_address=self._address, num_cached_tokens=0
        )
        self._decode.send(work.work_id, reserved=reserved)

    def _run_prompt_and_push(self, session: WorkerSession, message: prefill_pb2.StartPrefill) -> None:
        work = self._prefill.admit(session, message)
        if work is None:
            return
        first = _next_message(work, work.first_index, self.model)
        self._prefill.send(work.work_id, prefill_done=prefill_pb2.PrefillDone(work_id=message.work_id, tokens=[first]))
        self._prefill.send(work.work_id, transfer_done=prefill_pb2.TransferDone(work_id=message.work_id))
        self._prefill.leases.end(work.work_id)
        self._peers[message.push_address].receive_push(work.work_id, time.monotonic())

    def receive_push(self, work_id: WorkId, first_sent_s: float) -> None:
        """A prefill worker delivers; its first token was sent at that monotonic second."""
        work = self._reserved.pop(work_id, None)
        if work is not None:
            self._start(work, work.first_index + 1, [first_sent_s])

    # --- the batch --------------------------------------------------------------------------------------------------------------

    def _start(self, work: Work, first_index: int, sent_times_s: list[float]) -> None:
        max_tokens = work.sampling.max_tokens or 0
        self.sent_times_s[work.work_id.request_id] = sent_times_s
        message = _next_message(work, first_index, self.model)
        self._running[work.work_id] = _RunningWork(work, message, max_tokens - first_index)
        self._decode.send(work.work_id, decode_started=decode_pb2.DecodeStarted(work_id=work_id_to_pb(work.work_id)))
        self._decode.update_load(WorkerLoad(num_running=len(self._running), num_free_blocks=1000, num_blocks=1000))
        self._started.release()

    async def _run_steps(self) -> None:
        while True:
            await self._stepping.wait()
            next_time_s = time.monotonic()
            while self._running:
                await self._step()
                if self._interval_s is not None:
                    next_time_s += self._interval_s
                    await asyncio.sleep(max(next_time_s - time.monotonic(), 0))
            self._stepping.clear()
            self._idle.set()

    async def _step(self) -> None:
        by_session: dict[WorkerSession, decode_pb2.StepOutput] = {}
        now = time.monotonic()
        ended = []
        for work_id, running in self._running.items():
            session = self._decode.leases.session_of(work_id)
            if session is None:
                ended.append(work_id)
                continue
            by_session.setdefault(session, decode_pb2.StepOutput()).tokens.append(running.message)
            self.sent_times_s[work_id.request_id].append(now)
            running.num_tokens_left -= 1
            if running.num_tokens_left > 0:
                _advance(running, self.model)
            else:
                ended.append(work_id)
        for session, output in by_session.items():
            session.send(step_output=output)
        for work_id in ended:
            self._forget(work_id)
        if self._interval_s is None:
            await asyncio.gather(*(session.wait_until_sent() for session in by_session))

    def _forget(self, work_id: WorkId) -> None:
        self._running.pop(work_id, None)
        self._reserved.pop(work_id, None)
        self._decode.leases.end(work_id)

    # --- who it is --------------------------------------------------------------------------------------------------------------

    def _make_sessions(self, role: MemberRole, response_type: Any, give_up: Callable[[WorkId], None]) -> WorkerSessions:
        hello = session_pb2.WorkerHello(
            worker_id=self._worker_ids[role],
            protocol_version=PROTOCOL_VERSION,
            model=model_to_pb(self.model),
            block_size=BLOCK_SIZE,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
        )
        sessions = WorkerSessions(hello, response_type, self.model, give_up, self._fail)
        sessions.update_load(WorkerLoad(num_free_blocks=1000, num_blocks=1000))
        return sessions

    def _fail(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        self._running.pop(work_id, None)
        self._decode.report_failure(work_id, kind, message)


def _next_message(work: Work, index: int, model: ModelSpec) -> session_pb2.SequenceToken:
    token_id = FIRST_TOKEN_ID + (index * TOKEN_ID_STRIDE) % NUM_TOKEN_IDS
    reason = finish_reason(token_id, index, work.num_prompt_tokens, work.sampling, model)
    return session_pb2.SequenceToken(
        work_id=work_id_to_pb(work.work_id),
        sequence=work.work_id.first_sequence,
        index=index,
        token=session_pb2.Token(token_id=token_id),
        finish_reason=finish_reason_to_pb(reason),
    )


def _advance(running: _RunningWork, model: ModelSpec) -> None:
    message = running.message
    message.index += 1
    message.token.token_id = FIRST_TOKEN_ID + (message.index * TOKEN_ID_STRIDE) % NUM_TOKEN_IDS
    if running.num_tokens_left == 1:
        message.finish_reason = session_pb2.FINISH_REASON_LENGTH


class _DecodeService(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: SimulatedWorker) -> None:
        self._worker = worker

    async def Session(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        await self._worker.serve(MemberRole.DECODE, context)


class _PrefillService(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: SimulatedWorker) -> None:
        self._worker = worker

    async def Session(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        await self._worker.serve(MemberRole.PREFILL, context)
