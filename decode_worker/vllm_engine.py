"""VllmEngine on a decode worker: continues prompts that a prefill worker has computed for smg, and computes others itself.

    smg -> prefill worker: Generate, one token, do_remote_decode        its prefix cache has the prompt's KV then
    smg -> decode worker:  Generate, with what the prefill worker said
             reserve blocks here -> StartPrefill with their ticket, over a session with that worker -> it pushes -> decode

So KV is handed over as with a gateway, ticket, digests and all. When that fails, the prompt is computed here.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator

import grpc
import structlog

from decode_worker.continuation import Continuation
from decode_worker.remote_prefill import prefilled
from decode_worker.service import DecodeService
from kvrelay.errors import CancelledRequestError, TransferError
from kvrelay.v1 import decode_pb2, prefill_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.local_session import LocalSession
from kvrelay.vllm_engine.messages import Message, engine_grpc
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.transfer_params import prefill_address_of
from kvrelay.vllm_engine.worker_service import Context, WorkerVllmEngine, error_of_failure
from kvrelay.wire import reserve_to_pb, sequence_token_from_pb, start_prefill_to_pb, work_id_to_pb
from kvrelay.work import Token

_log = structlog.get_logger(__name__)


class DecodeVllmEngine(WorkerVllmEngine):
    """Generate on a decode worker.

    Args:
        engine: the worker's.
        service: takes the works.
    """

    def __init__(self, engine: ServedEngine, service: DecodeService) -> None:
        super().__init__(engine, service.sessions)
        self._service = service

    async def Generate(self, request: Message, context: Context) -> AsyncIterator[Message]:
        work = self._work_of(request, context)
        address = None
        if request.HasField("kv_transfer_params_json") and work.num_sequences == 1:
            address = prefill_address_of(request.kv_transfer_params_json, self._engine.model.fingerprint)
        progress = Continuation(work)
        answers = Answers(
            len(work.token_ids), work.num_sequences, streams=request.stream, stop_token_ids=work.sampling.stop_token_ids
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

    async def _tokens(
        self, request_id: str, progress: Continuation, address: str | None
    ) -> AsyncIterator[dict[int, list[Token]]]:
        """New tokens by sequence, in order, until all sequences have ended."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + progress.work.deadline_ms / 1000
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
        session = self._open(request_id)
        prefill: asyncio.Task[None] | None = None
        try:
            self._service.take_command(session, "reserve", reserve_to_pb(progress.work, self._engine.model.fingerprint))
            while not progress.ended:
                name, message = await session.events.get()
                match name:
                    case "reserved":
                        progress.num_cached_tokens = message.num_cached_tokens
                        if address is None:
                            run_prompt = decode_pb2.RunPrompt(work_id=work_id_to_pb(progress.work.work_id))
                            self._service.take_command(session, "run_prompt", run_prompt)
                        else:
                            command = start_prefill_to_pb(
                                progress.work, message.ticket, message.push_address, message.num_cached_tokens
                            )
                            prefill = asyncio.create_task(_relay(session, address, command), name="prompt elsewhere")
                    case "step_output" | "prefill_done":
                        if tokens := progress.add(map(sequence_token_from_pb, message.tokens)):
                            yield tokens
                    case "work_failed":
                        raise error_of_failure(message)
                    case "failed":
                        raise message
        finally:
            if prefill is not None:
                prefill.cancel()
                await asyncio.wait([prefill])
            self._close(request_id, session)


def add_vllm_engine(server: grpc.aio.Server, engine: ServedEngine, service: DecodeService) -> None:
    """Adds the service to a server that is not started."""
    engine_grpc.add_VllmEngineServicer_to_server(DecodeVllmEngine(engine, service), server)


async def _relay(session: LocalSession, address: str, command: prefill_pb2.StartPrefill) -> None:
    """Puts what the prefill worker says among the session's events."""
    try:
        async for done in prefilled(address, command):
            session.send(prefill_done=done)
    except TransferError as failure:
        session.send(failed=failure)
