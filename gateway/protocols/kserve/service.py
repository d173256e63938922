"""GRPCInferenceService of a gateway. Its requests run and recover like InferenceService's."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from gateway.gateway import Gateway
from gateway.protocols.kserve import model_description
from gateway.protocols.kserve.requests import InferenceRequest, check_version, naming_inputs, parse
from gateway.protocols.kserve.responses import Responses, error_response
from gateway.requests.request_validation import deadline_of
from gateway.requests.tenants import take_session_key
from gateway.resume.stored_output import FrameReader
from kvrelay import __version__
from kvrelay.core.bounds import MAX_NAME_BYTES
from kvrelay.core.quoting import shortened
from kvrelay.errors import InvalidRequestError, KvrelayError
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.kserve import grpc_service_pb2_grpc

SERVICE_NAME = "inference.GRPCInferenceService"
MAX_REQUESTS_PER_STREAM = 256
"""At a time."""
STATUS_METADATA = "triton_grpc_error"
"""If "true", the stream ends with the status of the first failed request."""

Context = grpc.aio.ServicerContext[Any, Any]
Send = Callable[[pb.ModelInferResponse], Awaitable[None]]


class KServeService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # --- description ---

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
        connected = () if self._gateway.draining else self._gateway.models.connected()
        return sorted(limits.model.name for limits in connected)

    def _known_model(self, name: str, version: str) -> str:
        with naming_inputs():
            check_version(name, version)
            return self._gateway.models.select(name).model.name

    # --- generation ---

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
                await write(error_response(shortened(request.id, MAX_NAME_BYTES), failure))
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
        settings = self._gateway.settings
        take_session_key(context.invocation_metadata())
        deadline = deadline_of(settings, context.time_remaining(), request.timeout_s)
        responses = Responses(request)
        with naming_inputs():
            reader = await self._gateway.generation.open(request.generate, deadline)
            with readers.closing(reader):
                async for frames in reader.batches(settings.coalesce_ms / 1000):
                    responses.add(frames)
                    response = responses.take()
                    if response is not None:
                        await send(response)


class _Readers:
    """A call's open readers. A reader closes with its request or the call."""

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


def add_kserve(server: grpc.aio.Server, gateway: Gateway) -> None:
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KServeService(gateway), server)
