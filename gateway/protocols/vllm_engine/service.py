"""VllmEngine of a gateway. smg's requests run and recover like InferenceService's."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import time
from collections.abc import AsyncIterator

import grpc

from gateway.gateway import Gateway
from gateway.protocols.vllm_engine import cluster_answers
from gateway.protocols.vllm_engine.requests import ANY_MODEL, NO_TENANT, prepare
from gateway.requests.request_validation import deadline_of
from gateway.requests.runner import RequestRunner
from gateway.requests.tenants import take_session_key, tenant_of_call
from gateway.streaming.frames import DeltaFrame, Frame
from gateway.streaming.readers import OutputReader
from kvrelay.core.bounds import check_count
from kvrelay.core.job import Token
from kvrelay.errors import CancelledRequestError
from kvrelay.security.principal import current_principal
from kvrelay.v1 import inference_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.client_ids import MAX_ABORTED
from kvrelay.vllm_engine.messages import Message, engine_grpc, engine_pb
from kvrelay.vllm_engine.partial_service import Context, PartialVllmEngine
from kvrelay.vllm_engine.tokenizer_bundle import TokenizerDownloads
from kvrelay.wire.convert import finish_reason_from_pb

MAX_HELD_TOKENS = 16
"""More than one character needs."""


class VllmEngineService(PartialVllmEngine):
    """Serves the only model of a gateway's cluster."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started_at = time.monotonic()
        self._runners: dict[str, list[RequestRunner]] = {}
        """By the clients' ids, which may repeat."""
        self._tokenizer = TokenizerDownloads(gateway.tokenizers.files)

    async def Generate(self, request: Message, context: Context) -> AsyncIterator[Message]:
        take_session_key(context.invocation_metadata())
        deadline = deadline_of(self._gateway.settings, context.time_remaining())  # smg sets none
        async with self._gateway.starter.place(tenant_of_call(NO_TENANT), deadline) as place:
            prepared = await prepare(request, self._gateway.preparation, deadline)
            runner = self._gateway.starter.start(prepared, place)
        sampling = prepared.sampling
        answers = Answers(
            len(prepared.prompt_token_ids), sampling.n, streams=request.stream, stop_token_ids=sampling.stop_token_ids
        )
        reader = runner.open_reader()
        context.add_done_callback(lambda _: reader.close())  # type: ignore[arg-type]  # the stubs want a class of their own
        self._runners.setdefault(request.request_id, []).append(runner)
        try:
            async for message in _answer(reader, answers, self._gateway.settings.coalesce_ms / 1000):
                yield message
        except CancelledRequestError:  # by Abort or CancelRequest
            for message in answers.aborted():
                yield message
        finally:
            reader.close()
            self._forget(request.request_id, runner)

    async def Abort(self, request: Message, context: Context) -> Message:
        check_count("request_ids", request.request_ids, MAX_ABORTED)
        principal = current_principal()
        for request_id in request.request_ids:
            for runner in list(self._runners.get(request_id, ())):
                if principal.may_see(runner.request.tenant):  # clients of two tenants may use one id
                    runner.cancel()
        return engine_pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        return cluster_answers.health(self._gateway)

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        return cluster_answers.model_info(self._gateway.models.select(ANY_MODEL))

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        return cluster_answers.server_info(self._gateway, time.monotonic() - self._started_at)

    async def GetLoads(self, request: Message, context: Context) -> Message:
        return cluster_answers.loads(self._gateway)

    async def GetTokenizer(self, request: Message, context: Context) -> None:
        await self._tokenizer.send(self._gateway.models.select(ANY_MODEL).model.fingerprint, context.write)

    def _forget(self, request_id: str, runner: RequestRunner) -> None:
        runners = self._runners[request_id]
        runners.remove(runner)
        if not runners:
            del self._runners[request_id]


async def _answer(reader: OutputReader, answers: Answers, coalesce_s: float) -> AsyncIterator[Message]:
    held: dict[int, list[Token]] = {}
    async for frames in reader.batches(coalesce_s):
        for sequence, tokens in _tokens_by_sequence(frames, held).items():
            chunk = answers.add(sequence, tokens)
            if chunk is not None:
                yield chunk
        if frames and not isinstance(frames[-1], DeltaFrame) and frames[-1].finished:
            finished = inference_pb2.GenerateResponse.FromString(frames[-1].data).finished
            reasons = [
                reason for number in finished.finish_reasons if (reason := finish_reason_from_pb(number)) is not None
            ]
            for message in answers.complete(reasons, finished.usage.num_cached_tokens):
                yield message


def _tokens_by_sequence(frames: list[Frame], held: dict[int, list[Token]]) -> dict[int, list[Token]]:
    """Tokens with log probabilities wait in `held`, because smg shows them only with text."""
    tokens: dict[int, list[Token]] = {}
    for frame in frames:
        if not isinstance(frame, DeltaFrame):
            continue
        waiting = held.setdefault(frame.sequence, [])
        waiting.extend(frame.tokens)
        shows = frame.text or frame.finish_reason is not None or len(waiting) >= MAX_HELD_TOKENS
        if waiting and (shows or waiting[0].logprob is None):
            tokens.setdefault(frame.sequence, []).extend(waiting)
            waiting.clear()
    return tokens


def add_vllm_engine(server: grpc.aio.Server, gateway: Gateway) -> None:
    engine_grpc.add_VllmEngineServicer_to_server(VllmEngineService(gateway), server)
