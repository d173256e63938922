"""VllmEngine on a prefill worker, for smg, without a gateway.

Computes a prompt and returns this worker's address. The KV stays in the prefix cache until
`decode_worker/vllm_engine/service.py` asks for a push.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from kvrelay.core.job import FinishReason, Job
from kvrelay.errors import CancelledRequestError
from kvrelay.kv_transfer.codec import TICKET_BYTES
from kvrelay.v1 import prefill_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.local_session import LocalSessions
from kvrelay.vllm_engine.messages import Message, engine_grpc
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.transfer_params import asks_for_handoff, handoff_params
from kvrelay.vllm_engine.worker_service import WorkerVllmEngine, error_of_failure
from kvrelay.wire.convert import sequence_token_from_pb, start_prefill_to_pb
from prefill_worker.service import PrefillService


class PrefillGeneration:
    """Answers with one token. `address` is this worker's host:port, for decode workers."""

    def __init__(self, engine: ServedEngine, service: PrefillService, sessions: LocalSessions, address: str) -> None:
        self._engine = engine
        self._service = service
        self._sessions = sessions
        self._address = address

    async def generate(self, request: Message, job: Job) -> AsyncIterator[Message]:
        hands_over = request.HasField("kv_transfer_params_json") and asks_for_handoff(request.kv_transfer_params_json)
        # The job ends with its first token, so nothing is pushed.
        job = replace(job, num_sequences=1, sampling=replace(job.sampling, n=1, max_tokens=1, min_tokens=0))
        answers = Answers(len(job.token_ids), 1, streams=request.stream)
        try:
            done = await self._compute(request.request_id, job)
        except CancelledRequestError:
            last = answers.aborted()
        else:
            token = sequence_token_from_pb(done.tokens[0])
            chunk = answers.add(0, [token.token])
            if chunk is not None:
                yield chunk
            params = handoff_params(self._address, self._engine.model.fingerprint) if hands_over else None
            last = answers.complete([token.finish_reason or FinishReason.LENGTH], done.num_cached_tokens, params)
        for message in last:
            yield message

    async def _compute(self, request_id: str, job: Job) -> prefill_pb2.PrefillDone:
        with self._sessions.open(request_id) as session:
            self._service.handle_command(session, "start_prefill", start_prefill_to_pb(job, bytes(TICKET_BYTES), "", 0))
            while True:
                name, message = await session.events.get()
                match name:
                    case "prefill_done":
                        done: prefill_pb2.PrefillDone = message
                        return done
                    case "job_failed":
                        raise error_of_failure(message)
                    case "failed":
                        raise message


def add_vllm_engine(server: grpc.aio.Server, engine: ServedEngine, service: PrefillService, address: str) -> None:
    sessions = LocalSessions(service.sessions)
    generation = PrefillGeneration(engine, service, sessions, address)
    servicer = WorkerVllmEngine(engine, service.sessions, sessions, generation.generate)
    engine_grpc.add_VllmEngineServicer_to_server(servicer, server)
