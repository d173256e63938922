"""VllmEngine on a decode worker, for smg, without a gateway.

smg -> prefill worker: Generate, one token; the prompt's KV stays in its prefix cache
smg -> decode worker:  Generate, with the prefill worker's answer
         reserve blocks -> StartPrefill with their ticket, over a session with that worker
         -> it pushes -> decode
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator

import grpc
import structlog

from decode_worker.service import DecodeService
from decode_worker.vllm_engine.continuation import Continuation
from decode_worker.vllm_engine.remote_prefill import prefilled
from kvrelay.core.job import Job, Token
from kvrelay.core.member import MemberRole
from kvrelay.core.quoting import quoted
from kvrelay.errors import CancelledRequestError, InvalidRequestError, TransferError
from kvrelay.security.credentials import ChannelCredentials, Towards
from kvrelay.security.principal import Role
from kvrelay.state.registered_peers import RegisteredPeers
from kvrelay.v1 import decode_pb2, prefill_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.local_session import LocalSession, LocalSessions
from kvrelay.vllm_engine.messages import Message, engine_grpc
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.transfer_params import prefill_address_of
from kvrelay.vllm_engine.worker_service import WorkerVllmEngine, error_of_failure
from kvrelay.wire.convert import job_id_to_pb, reserve_to_pb, sequence_token_from_pb, start_prefill_to_pb

_log = structlog.get_logger(__name__)


class DecodeGeneration:
    """`peers` None lets every address count, as in tests without Redis."""

    def __init__(
        self,
        engine: ServedEngine,
        service: DecodeService,
        sessions: LocalSessions,
        towards: Towards,
        peers: RegisteredPeers | None,
    ) -> None:
        self._towards = towards
        self._peers = peers
        self._engine = engine
        self._service = service
        self._sessions = sessions

    async def generate(self, request: Message, job: Job) -> AsyncIterator[Message]:
        address = None
        if request.HasField("kv_transfer_params_json") and job.num_sequences == 1:
            address = prefill_address_of(request.kv_transfer_params_json, self._engine.model.fingerprint)
            await self._check_address(address)
        progress = Continuation(job)
        answers = Answers(
            len(job.token_ids), job.num_sequences, streams=request.stream, stop_token_ids=job.sampling.stop_token_ids
        )
        try:
            async for tokens in self._tokens(request.request_id, progress, address):
                for sequence, new in tokens.items():
                    chunk = answers.add(sequence, new)
                    if chunk is not None:
                        yield chunk
        except CancelledRequestError:
            last = answers.aborted()
        else:
            last = answers.complete(progress.reasons, progress.num_cached_tokens)
        for message in last:
            yield message

    async def _check_address(self, address: str | None) -> None:
        """A client could name any address; nothing is dialled before this."""
        if address is None or self._peers is None:
            return
        if not await self._peers.is_registered(MemberRole.PREFILL, address):
            raise InvalidRequestError(
                "kv_transfer_params_json", f"names {quoted(address)}, where no prefill worker is registered"
            )

    async def _tokens(
        self, request_id: str, progress: Continuation, address: str | None
    ) -> AsyncIterator[dict[int, list[Token]]]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + progress.job.deadline_ms / 1000
        if address is not None:
            try:
                async for tokens in self._attempt(request_id, progress, address):
                    yield tokens
                return
            except TransferError as failure:
                _log.warning("no KV came; the prompt is computed here", reason=failure.message, prefill_worker=address)
            progress.begin_again(max(int((deadline - loop.time()) * 1000), 0))
        async for tokens in self._attempt(request_id, progress, None):
            yield tokens

    async def _attempt(
        self, request_id: str, progress: Continuation, address: str | None
    ) -> AsyncIterator[dict[int, list[Token]]]:
        prefill: asyncio.Task[None] | None = None
        with self._sessions.open(request_id) as session:
            try:
                self._service.handle_command(
                    session, "reserve", reserve_to_pb(progress.job, self._engine.model.fingerprint)
                )
                while not progress.ended:
                    name, message = await session.events.get()
                    match name:
                        case "reserved":
                            progress.num_cached_tokens = message.num_cached_tokens
                            if address is None:
                                run_prompt = decode_pb2.RunPrompt(job_id=job_id_to_pb(progress.job.job_id))
                                self._service.handle_command(session, "run_prompt", run_prompt)
                            else:
                                command = start_prefill_to_pb(
                                    progress.job, message.ticket, message.push_address, message.num_cached_tokens
                                )
                                prefill = asyncio.create_task(
                                    _relay(session, address, command, self._towards(Role.PREFILL)),
                                    name="prompt elsewhere",
                                )
                        case "step_output" | "prefill_done":
                            if tokens := progress.add(map(sequence_token_from_pb, message.tokens)):
                                yield tokens
                        case "job_failed":
                            raise error_of_failure(message)
                        case "failed":
                            raise message
            finally:
                if prefill is not None:
                    prefill.cancel()
                    await asyncio.wait([prefill])


def add_vllm_engine(
    server: grpc.aio.Server,
    engine: ServedEngine,
    service: DecodeService,
    towards: Towards,
    peers: RegisteredPeers | None,
) -> None:
    sessions = LocalSessions(service.sessions)
    generation = DecodeGeneration(engine, service, sessions, towards, peers)
    servicer = WorkerVllmEngine(engine, service.sessions, sessions, generation.generate)
    engine_grpc.add_VllmEngineServicer_to_server(servicer, server)


async def _relay(
    session: LocalSession, address: str, command: prefill_pb2.StartPrefill, credentials: ChannelCredentials | None
) -> None:
    try:
        async for done in prefilled(address, command, credentials):
            session.send(prefill_done=done)
    except TransferError as failure:
        session.send(failed=failure)
