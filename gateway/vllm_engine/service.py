"""VllmEngine as a gateway serves it: smg's requests take the same way as those of InferenceService, recovery included."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from gateway.output_frames import DeltaFrame, Frame
from gateway.output_readers import OutputReader
from gateway.relay import Relay
from gateway.request_runner import RequestRunner
from gateway.vllm_engine import cluster_answers
from gateway.vllm_engine.requests import ANY_MODEL, prepare
from kvrelay.errors import CancelledRequestError, UnsupportedError
from kvrelay.v1 import inference_pb2
from kvrelay.vllm_engine.answers import Answers
from kvrelay.vllm_engine.messages import Message, engine_grpc, engine_pb
from kvrelay.vllm_engine.tokenizer_bundle import bundle, pieces
from kvrelay.wire import finish_reason_from_pb
from kvrelay.work import Token

Context = grpc.aio.ServicerContext[Any, Any]


class VllmEngineService(engine_grpc.VllmEngineServicer):  # type: ignore[misc]  # its base is not typed
    """Serves the one model of a gateway's cluster.

    Args:
        relay: this gateway.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._started_at = time.monotonic()
        self._runners: dict[str, list[RequestRunner]] = {}
        """By the ids that clients gave, which two clients may give twice."""
        self._archives: dict[str, bytes] = {}

    async def Generate(self, request: Message, context: Context) -> AsyncIterator[Message]:
        self._relay.check_open()
        self._relay.check_room()
        prepared = await prepare(request, self._relay, self._deadline(context))
        sampling = prepared.sampling
        answers = Answers(
            len(prepared.prompt_token_ids), sampling.n, streams=request.stream, stop_token_ids=sampling.stop_token_ids
        )
        runner = self._relay.start(prepared)
        reader = runner.open_reader()
        context.add_done_callback(lambda _: reader.close())  # type: ignore[arg-type]  # the stubs want a class of their own
        self._runners.setdefault(request.request_id, []).append(runner)
        try:
            async for message in _answer(reader, answers, self._relay.settings.coalesce_ms / 1000):
                yield message
        except CancelledRequestError:  # by Abort or CancelRequest
            for message in answers.aborted():
                yield message
        finally:
            reader.close()
            self._forget(request.request_id, runner)

    async def Abort(self, request: Message, context: Context) -> Message:
        for request_id in request.request_ids:
            for runner in list(self._runners.get(request_id, ())):
                runner.cancel()
        return engine_pb.AbortResponse()

    async def HealthCheck(self, request: Message, context: Context) -> Message:
        return cluster_answers.health(self._relay)

    async def GetModelInfo(self, request: Message, context: Context) -> Message:
        return cluster_answers.model_info(self._relay.models.select(ANY_MODEL))

    async def GetServerInfo(self, request: Message, context: Context) -> Message:
        return cluster_answers.server_info(self._relay, time.monotonic() - self._started_at)

    async def GetLoads(self, request: Message, context: Context) -> Message:
        return cluster_answers.loads(self._relay)

    async def GetTokenizer(self, request: Message, context: Context) -> AsyncIterator[Message]:
        fingerprint = self._relay.models.select(ANY_MODEL).model.fingerprint
        if fingerprint not in self._archives:
            files = await self._relay.tokenizers.files(fingerprint)
            self._archives = {fingerprint: await asyncio.to_thread(bundle, files)}
        for piece in pieces(self._archives[fingerprint]):
            yield piece

    async def FlushCache(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("prefix caches are not flushed: they hold nothing that may not be used")

    async def Embed(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("embeddings are not computed; ask for generated text")

    async def StartProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/measuring.md")

    async def StopProfile(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("engines are not profiled through this service; see docs/measuring.md")

    async def SubscribeKvEvents(self, request: Message, context: Context) -> Message:
        raise UnsupportedError("events of single KV blocks are not published; GetLoads says how full the workers are")

    def _deadline(self, context: Context) -> float:
        """Monotonic seconds: what the call allows; smg sets no deadline, and gets the default one."""
        settings = self._relay.settings
        remaining_s = context.time_remaining()
        allowed_s = settings.default_timeout_ms / 1000 if remaining_s is None else remaining_s
        return asyncio.get_running_loop().time() + max(min(allowed_s, settings.max_timeout_ms / 1000), 0.0)

    def _forget(self, request_id: str, runner: RequestRunner) -> None:
        runners = self._runners[request_id]
        runners.remove(runner)
        if not runners:
            del self._runners[request_id]


async def _answer(reader: OutputReader, answers: Answers, coalesce_s: float) -> AsyncIterator[Message]:
    """The frames of a request as this protocol's messages, until it has succeeded."""
    async for frames in reader.batches(coalesce_s):
        for sequence, tokens in _tokens_by_sequence(frames).items():
            chunk = answers.add(sequence, tokens)
            if chunk is not None:
                yield chunk
        if frames and not isinstance(frames[-1], DeltaFrame) and frames[-1].finished:
            finished = inference_pb2.GenerateResponse.FromString(frames[-1].data).finished
            reasons = [reason for number in finished.finish_reasons if (reason := finish_reason_from_pb(number)) is not None]
            for message in answers.complete(reasons, finished.usage.num_cached_tokens):
                yield message


def _tokens_by_sequence(frames: list[Frame]) -> dict[int, list[Token]]:
    tokens: dict[int, list[Token]] = {}
    for frame in frames:
        if isinstance(frame, DeltaFrame):
            tokens.setdefault(frame.sequence, []).extend(frame.tokens)
    return tokens


def add_vllm_engine(server: grpc.aio.Server, relay: Relay) -> None:
    """Adds the service to a server that is not started."""
    engine_grpc.add_VllmEngineServicer_to_server(VllmEngineService(relay), server)
