"""VllmEngine on a prefill worker: computes a prompt for smg, and says where it did. The KV stays in the prefix cache, from where
the decode worker has it pushed (`decode_worker/vllm_engine.py`); what falls out of the cache until then is computed again.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import AsyncIterator
from dataclasses import replace

import grpc

from kvrelay.errors import CancelledRequestError
from kvrelay.kv_transfer.codec import TICKET_BYTES
from kvrelay.v1 import prefill_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.messages import Message, engine_grpc
from kvrelay.vllm_engine.served_engine import ServedEngine
from kvrelay.vllm_engine.transfer_params import asks_for_handover, handover
from kvrelay.vllm_engine.worker_service import Context, WorkerVllmEngine, error_of_failure
from kvrelay.wire import sequence_token_from_pb, start_prefill_to_pb
from kvrelay.work import FinishReason, Work
from prefill_worker.service import PrefillService


class PrefillVllmEngine(WorkerVllmEngine):
    """Generate on a prefill worker: one token, whatever was asked for.

    Args:
        engine: the worker's.
        service: takes the works.
        address: host:port under which decode workers reach this one.
    """

    def __init__(self, engine: ServedEngine, service: PrefillService, address: str) -> None:
        super().__init__(engine, service.sessions)
        self._service = service
        self._address = address

    async def Generate(self, request: Message, context: Context) -> AsyncIterator[Message]:
        hands_over = request.HasField("kv_transfer_params_json") and asks_for_handover(request.kv_transfer_params_json)
        work = self._work_of(request, context)
        # That ends with its first token, and so nothing is pushed anywhere.
        work = replace(work, num_sequences=1, sampling=replace(work.sampling, n=1, max_tokens=1, min_tokens=0))
        answers = Answers(len(work.token_ids), 1, streams=request.stream)
        try:
            done = await self._compute(request.request_id, work)
        except CancelledRequestError:
            last = answers.aborted()
        else:
            token = sequence_token_from_pb(done.tokens[0])
            chunk = answers.add(0, [token.token])
            if chunk is not None:
                yield chunk
            params = handover(self._address, self._engine.model.fingerprint) if hands_over else None
            last = answers.complete([token.finish_reason or FinishReason.LENGTH], done.num_cached_tokens, params)
        for message in last:
            yield message

    async def _compute(self, request_id: str, work: Work) -> prefill_pb2.PrefillDone:
        session = self._open(request_id)
        try:
            self._service.take_command(session, "start_prefill", start_prefill_to_pb(work, bytes(TICKET_BYTES), "", 0))
            while True:
                name, message = await session.events.get()
                match name:
                    case "prefill_done":
                        done: prefill_pb2.PrefillDone = message
                        return done
                    case "work_failed":
                        raise error_of_failure(message)
                    case "failed":
                        raise message
        finally:
            self._close(request_id, session)


def add_vllm_engine(server: grpc.aio.Server, engine: ServedEngine, service: PrefillService, address: str) -> None:
    """Adds the service to a server that is not started."""
    engine_grpc.add_VllmEngineServicer_to_server(PrefillVllmEngine(engine, service, address), server)
