"""GRPCInferenceService as a gateway serves it: requests take the same way as InferenceService's, recovery included."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from gateway.deadline import time_allowed_s
from gateway.generation import Generation
from gateway.kserve import model_description
from gateway.kserve.requests import InferenceRequest, check_version, naming_inputs, parse
from gateway.kserve.responses import Responses, error_response
from gateway.relay import Relay
from gateway.stored_output import FrameReader
from kvrelay import __version__
from kvrelay.errors import InvalidRequestError, KvrelayError
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.kserve import grpc_service_pb2_grpc

SERVICE_NAME = "inference.GRPCInferenceService"
MAX_REQUESTS_PER_STREAM = 256
"""At a time; the next one is read from the stream when one of them has ended."""
STATUS_METADATA = "triton_grpc_error"
"""A stream whose metadata has this as "true" ends with the status of the first request that fails."""

Context = grpc.aio.ServicerContext[Any, Any]
Send = Callable[[pb.ModelInferResponse], Awaitable[None]]


class KServeService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """The service of one gateway.

    Args:
        relay: this gateway.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._generation = Generation(relay)

    # --- what there is --------------------------------------------------------------------------------------------------------

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=bool(self._ready_models()))

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        has_version = request.version in ("", model_description.MODEL_VERSION)
        return pb.ModelReadyResponse(ready=has_version and request.name in self._ready_models())

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=model_description.PLATFORM, version=__version__, extensions=model_description.EXTENSIONS
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        return model_description.metadata(self._known_model(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=model_description.config(self._known_model(request.name, request.version)))

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        model = pb.RepositoryIndexResponse.ModelIndex
        names = self._ready_models()
        version = model_description.MODEL_VERSION
        return pb.RepositoryIndexResponse(models=[model(name=name, version=version, state="READY") for name in names])

    def _ready_models(self) -> list[str]:
        """Names of the models that can be asked now."""
        return [] if self._relay.draining else sorted(limits.model.name for limits in self._relay.models.connected())

    def _known_model(self, name: str, version: str) -> str:
        with naming_inputs():
            check_version(name, version)
            return self._relay.models.select(name).model.name

    # --- generation -----------------------------------------------------------------------------------------------------------

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        parsed = parse(request)
        if parsed.streams:
            problem = "is true; several responses come from ModelStreamInfer only: call it, or send false"
            raise InvalidRequestError(model_description.STREAM, problem)
        answers: list[pb.ModelInferResponse] = []

        async def keep(response: pb.ModelInferResponse) -> None:
            answers.append(response)

        await self._run(parsed, context, keep, _Readers(context))
        (answer,) = answers
        return answer

    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        writing = asyncio.Lock()
        readers = _Readers(context)
        places = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        wants_status = (STATUS_METADATA, "true") in ((key, value) for key, value in context.invocation_metadata() or ())

        async def write(message: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(message)

        async def send(response: pb.ModelInferResponse) -> None:
            await write(pb.ModelStreamInferResponse(infer_response=response))

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                await self._run(parse(request), context, send, readers)
            except KvrelayError as failure:
                if wants_status:
                    raise
                await write(error_response(request.id, failure))
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for request in request_iterator:
                    await places.acquire()
                    group.create_task(answer(request))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _run(self, request: InferenceRequest, context: Context, send: Send, readers: _Readers) -> None:
        """Generates, and sends the responses as they come.

        Raises:
            KvrelayError: the request is refused, or ended with it.
        """
        settings = self._relay.settings
        deadline = asyncio.get_running_loop().time() + time_allowed_s(settings, context.time_remaining(), request.timeout_s)
        responses = Responses(request)
        with naming_inputs():
            reader = await self._generation.open(request.generate, deadline)
            with readers.closing(reader):
                async for frames in reader.batches(settings.coalesce_ms / 1000):
                    responses.add(frames)
                    response = responses.take()
                    if response is not None:
                        await send(response)


class _Readers:
    """The readers of one call: each is closed when its request has ended, all of them at once when the call does."""

    def __init__(self, context: Context) -> None:
        self._open: set[FrameReader] = set()
        context.add_done_callback(lambda _: self._close_all())  # type: ignore[arg-type]  # the stubs want a class of their own

    @contextmanager
    def closing(self, reader: FrameReader) -> Iterator[None]:
        self._open.add(reader)
        try:
            yield
        finally:
            self._open.discard(reader)
            reader.close()

    def _close_all(self) -> None:
        for reader in list(self._open):
            reader.close()


def add_kserve(server: grpc.aio.Server, relay: Relay) -> None:
    """Adds the service to a server that is not started."""
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KServeService(relay), server)
