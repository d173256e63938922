"""A worker without a model, to measure what is around models: it speaks both session protocols and
makes tokens from nothing.

One process is prefill and decode worker at once. A prompt takes no time, its KV is "pushed" by a
call within the process, and a step gives every running sequence one token, at a set interval or as
fast as gateways read. When each step was sent is kept, so that whoever knows a token's index knows
when it left. Only the model is simulated: sessions, leases and messages are real.
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

from benchmarks.bench_credentials import BenchCredentials
from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import FailureKind, Job, JobId, WorkerLoad
from kvrelay.core.liveness import PROTOCOL_VERSION
from kvrelay.core.member import Member, MemberRole
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.network.rpc import create_server
from kvrelay.security.principal import Role
from kvrelay.state.member_registry import MemberRegistry
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, session_pb2, session_pb2_grpc
from kvrelay.wire.convert import finish_reason_to_pb, job_id_from_pb, job_id_to_pb, model_to_pb
from kvrelay.worker.gateway_session import GatewaySession
from kvrelay.worker.gateway_sessions import GatewaySessions
from kvrelay.worker.tokenizer_service import TokenizerService

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
class _RunningJob:
    """A job in the batch. `message` is the next token of its one sequence, changed in place with
    every step.
    """

    job: Job
    message: session_pb2.SequenceToken
    num_tokens_left: int


class SimulatedWorker:
    """`async with SimulatedWorker(redis_url, folder).running() as worker:` serves and is registered
    under both roles.

    Args:
        redis_url: where to register.
        tokenizer_folder: of the model whose tokenizer gateways get.
        started: released once for every job that joins the batch.
        peers: all simulated workers by address, shared: where pushes go.
        credentials: None speaks plain text.
    """

    def __init__(
        self,
        redis_url: str,
        tokenizer_folder: Path,
        started: asyncio.Semaphore,
        peers: dict[str, SimulatedWorker],
        credentials: BenchCredentials | None = None,
    ) -> None:
        self.model = simulated_model()
        self.sent_times_s: dict[str, list[float]] = {}
        """Of each request, by token index: the monotonic second at which the token's step was
        handed to gRPC.
        """
        self._redis_url = redis_url
        self._tokenizer_folder = tokenizer_folder
        self._started = started
        self._peers = peers
        self._credentials = credentials
        self._address = ""
        self._reserved: dict[JobId, Job] = {}
        self._running: dict[JobId, _RunningJob] = {}
        self._interval_s: float | None = None
        self._stepping = asyncio.Event()
        self._idle = asyncio.Event()
        self._worker_ids = {
            role: f"{role.value}-{secrets.token_hex(8)}" for role in (MemberRole.DECODE, MemberRole.PREFILL)
        }
        self._decode = self._make_sessions(MemberRole.DECODE, decode_pb2.DecodeServiceSessionResponse, self._forget)
        # What a prefill worker is told to give up, the decode worker is told too.
        self._prefill = self._make_sessions(
            MemberRole.PREFILL, prefill_pb2.PrefillServiceSessionResponse, lambda _: None
        )

    @property
    def is_connected(self) -> bool:
        """Whether a gateway has sessions with it in both roles."""
        return min(self._decode.num_sessions, self._prefill.num_sessions) > 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SimulatedWorker]:
        """Serves on a free port of the loopback interface."""
        server = create_server()
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(_DecodeService(self), server)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillService(self), server)
        session_pb2_grpc.add_ModelServiceServicer_to_server(
            TokenizerService(self._tokenizer_folder, _FINGERPRINT), server
        )
        addresses = self._bind(server)
        self._address = addresses[MemberRole.DECODE]
        self._peers[self._address] = self
        await server.start()
        stepping = asyncio.create_task(self._run_steps(), name="steps")
        try:
            async with RedisConnection(self._redis_url) as connection, contextlib.AsyncExitStack() as leases:
                registry = MemberRegistry(connection, LEASE_MS)
                for role, worker_id in self._worker_ids.items():
                    member = Member(worker_id, role, addresses[role], self.model.name, self.model.fingerprint)
                    await leases.enter_async_context(registry.lease(member))
                yield self
        finally:
            stepping.cancel()
            await asyncio.wait([stepping])
            await server.stop(0)

    def _bind(self, server: grpc.aio.Server) -> dict[MemberRole, str]:
        """Addresses of both roles: one in plain text, two with certificates, which name one role each."""
        if self._credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
            return dict.fromkeys(self._worker_ids, f"127.0.0.1:{port}")
        return {
            role: f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', self._credentials.server_credentials(Role(role.value)))}"
            for role in self._worker_ids
        }

    @property
    def num_running(self) -> int:
        """Jobs in the batch."""
        return len(self._running)

    async def run_steps(self, interval_s: float | None) -> None:
        """Steps until nothing runs any more, once in so many seconds; None: as fast as gateways
        take them.
        """
        self._interval_s = interval_s
        self._idle.clear()
        self._stepping.set()
        await self._idle.wait()

    # --- commands of gateways ---------------------------------------------------------------------

    async def serve(self, role: MemberRole, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One session."""
        await (self._decode if role is MemberRole.DECODE else self._prefill).serve(context, self._on_command)

    def _on_command(self, session: GatewaySession, name: str, message: Any) -> None:
        match name:
            case "reserve":
                self._reserve(session, message)
            case "start_prefill":
                self._run_prompt_and_push(session, message)
            case "run_prompt":
                job = self._reserved.pop(job_id_from_pb(message.job_id), None)
                if job is not None:
                    self._start(job, job.first_index, [])
            case "finish_sequence":
                self._forget(job_id_from_pb(message.job_id))
            case "cancel_job":
                job_id = job_id_from_pb(message.job_id)
                self._decode.cancel(session, job_id)
                self._prefill.cancel(session, job_id)

    def _reserve(self, session: GatewaySession, message: decode_pb2.Reserve) -> None:
        self._decode.admit(session, message, self._open_reservation)

    def _open_reservation(self, job: Job) -> None:
        self._reserved[job.job_id] = job
        reserved = decode_pb2.Reserved(
            job_id=job_id_to_pb(job.job_id),
            ticket=secrets.token_bytes(16),
            push_address=self._address,
            num_cached_tokens=0,
        )
        self._decode.send(job.job_id, reserved=reserved)

    def _run_prompt_and_push(self, session: GatewaySession, message: prefill_pb2.StartPrefill) -> None:
        self._prefill.admit(session, message, lambda job: self._prefill_and_push(job, message.push_address))

    def _prefill_and_push(self, job: Job, push_address: str) -> None:
        first = _next_message(job, job.first_index, self.model)
        job_id = job_id_to_pb(job.job_id)
        self._prefill.send(job.job_id, prefill_done=prefill_pb2.PrefillDone(job_id=job_id, tokens=[first]))
        self._prefill.send(job.job_id, transfer_done=prefill_pb2.TransferDone(job_id=job_id))
        self._prefill.leases.end(job.job_id)
        self._peers[push_address].receive_push(job.job_id, time.monotonic())

    def receive_push(self, job_id: JobId, first_sent_s: float) -> None:
        """A prefill worker delivers; its first token was sent at that monotonic second."""
        job = self._reserved.pop(job_id, None)
        if job is not None:
            self._start(job, job.first_index + 1, [first_sent_s])

    # --- the batch --------------------------------------------------------------------------------

    def _start(self, job: Job, first_index: int, sent_times_s: list[float]) -> None:
        max_tokens = job.sampling.max_tokens or 0
        self.sent_times_s[job.job_id.request_id] = sent_times_s
        message = _next_message(job, first_index, self.model)
        self._running[job.job_id] = _RunningJob(job, message, max_tokens - first_index)
        self._decode.send(job.job_id, decode_started=decode_pb2.DecodeStarted(job_id=job_id_to_pb(job.job_id)))
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
        by_session: dict[GatewaySession, decode_pb2.StepOutput] = {}
        now = time.monotonic()
        ended = []
        for job_id, running in self._running.items():
            session = self._decode.leases.session_of(job_id)
            if not isinstance(session, GatewaySession):
                ended.append(job_id)
                continue
            by_session.setdefault(session, decode_pb2.StepOutput()).tokens.append(running.message)
            self.sent_times_s[job_id.request_id].append(now)
            running.num_tokens_left -= 1
            if running.num_tokens_left > 0:
                _advance(running, self.model)
            else:
                ended.append(job_id)
        for session, output in by_session.items():
            session.send(step_output=output)
        for job_id in ended:
            self._forget(job_id)
        if self._interval_s is None:
            await asyncio.gather(*(session.wait_until_sent() for session in by_session))

    def _forget(self, job_id: JobId) -> None:
        self._running.pop(job_id, None)
        self._reserved.pop(job_id, None)
        self._decode.leases.end(job_id)

    # --- who it is --------------------------------------------------------------------------------

    def _make_sessions(self, role: MemberRole, response_type: Any, give_up: Callable[[JobId], None]) -> GatewaySessions:
        hello = session_pb2.WorkerHello(
            worker_id=self._worker_ids[role],
            protocol_version=PROTOCOL_VERSION,
            model=model_to_pb(self.model),
            block_size=BLOCK_SIZE,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
        )
        sessions = GatewaySessions(hello, response_type, self.model, give_up, self._fail)
        sessions.update_load(WorkerLoad(num_free_blocks=1000, num_blocks=1000))
        return sessions

    def _fail(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        self._running.pop(job_id, None)
        self._decode.report_failure(job_id, kind, message)


def _next_message(job: Job, index: int, model: ModelSpec) -> session_pb2.SequenceToken:
    token_id = FIRST_TOKEN_ID + (index * TOKEN_ID_STRIDE) % NUM_TOKEN_IDS
    reason = finish_reason(token_id, index, job.num_prompt_tokens, job.sampling, model)
    return session_pb2.SequenceToken(
        job_id=job_id_to_pb(job.job_id),
        sequence=job.job_id.first_sequence,
        index=index,
        token=session_pb2.Token(token_id=token_id),
        finish_reason=finish_reason_to_pb(reason),
    )


def _advance(running: _RunningJob, model: ModelSpec) -> None:
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
