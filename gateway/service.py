"""InferenceService: what clients call. Each method reads a message, asks those that know, and answers."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from gateway import cluster_view, timeline_view
from gateway.cancellation import FORWARDED_METADATA, cancel_request
from gateway.converse import Converser
from gateway.deadline import time_allowed_s
from gateway.generation import Generation
from gateway.output_frames import Frame, messages
from gateway.prompt_preparation import encode_rendered, encode_text, render_chat
from gateway.relay import Relay
from gateway.request_validation import check_token_ids, parse_messages
from gateway.stored_output import FrameReader, open_reader
from kvrelay.config import MAX_COALESCE_MS
from kvrelay.errors import InvalidRequestError, RequestNotFoundError
from kvrelay.request_record import RequestSummary
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MODEL_WAIT_S = 5.0

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The public service of one gateway.

    Args:
        relay: this gateway.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._generation = Generation(relay)

    # Streams are written as the bytes that frames have once for all readers: responses of the three methods have the same fields.

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        coalesce_s = self._coalesce_s(request)
        reader = await self._generation.open(request, self._deadline(context))
        await _stream(reader, context, coalesce_s)

    async def Converse(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConverseRequest], context: Context
    ) -> None:
        converser = Converser(self._relay)
        async for turn in request_iterator:
            coalesce_s = self._coalesce_s(turn)
            reader = await converser.begin_turn(turn, self._deadline(context, turn.timeout_ms))
            await _stream(reader, context, coalesce_s, converser.note)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        coalesce_s = self._coalesce_s(request)
        reader = open_reader(self._relay, request.request_id, request.from_index)
        await _stream(reader, context, coalesce_s)

    async def GetRequest(self, request: pb.GetRequestRequest, context: Context) -> pb.GetRequestResponse:
        runner = self._relay.requests.find(request.request_id)
        record: RequestSummary | None
        if runner is not None:
            record = runner.journal.record
        else:
            record = await self._relay.store.get(request.request_id)
        if record is None:
            raise RequestNotFoundError(f"request {request.request_id!r} is not known, or was forgotten; check the id")
        return pb.GetRequestResponse(request=cluster_view.request_info(record))

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequestError("page_size", f"is {page_size}; it must lie between 1 and {MAX_PAGE_SIZE}")
        page = await cluster_view.list_requests(self._relay, page_size, request.page_token, request.active_only)
        requests = [cluster_view.request_info(record) for record in page.requests]
        return pb.ListRequestsResponse(requests=requests, next_page_token=page.next_page_token)

    async def CancelRequest(self, request: pb.CancelRequestRequest, context: Context) -> pb.CancelRequestResponse:
        state = await cancel_request(self._relay, request.request_id, forwarded=_is_forwarded(context))
        return pb.CancelRequestResponse(state=cluster_view.state_to_pb(state))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        limits = await self._relay.models.wait_and_select(request.model, MODEL_WAIT_S)
        tokenizer = await self._relay.tokenizers.get(limits.model.fingerprint)
        match request.WhichOneof("input"):
            case "text":
                token_ids = await encode_text(tokenizer, request.text)
            case "chat":
                messages = parse_messages(request.chat.messages, "input.chat.messages")
                token_ids = await encode_rendered(tokenizer, await render_chat(tokenizer, messages, "input.chat.messages"))
            case _:
                raise InvalidRequestError("input", "is absent; send text or chat")
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        limits = await self._relay.models.wait_and_select(request.model, MODEL_WAIT_S)
        check_token_ids(request.token_ids, "token_ids", limits.model)
        tokenizer = await self._relay.tokenizers.get(limits.model.fingerprint)
        text = await asyncio.to_thread(tokenizer.decode, list(request.token_ids), keep_special_tokens=request.keep_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=await cluster_view.served_models(self._relay))

    async def GetTimeline(self, request: pb.GetTimelineRequest, context: Context) -> pb.GetTimelineResponse:
        return await timeline_view.get_timeline(self._relay, request.request_id, forwarded=_is_forwarded(context))

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        return await cluster_view.cluster(self._relay)

    def _coalesce_s(self, request: pb.GenerateRequest | pb.ConverseRequest | pb.ResumeRequest) -> float:
        """How long tokens of the stream may be gathered, in seconds: what the request says, or the gateway's own setting."""
        if not request.HasField("coalesce_ms"):
            return self._relay.settings.coalesce_ms / 1000
        if request.coalesce_ms > MAX_COALESCE_MS:
            raise InvalidRequestError("coalesce_ms", f"is {request.coalesce_ms}; it must lie between 0 and {MAX_COALESCE_MS}")
        return request.coalesce_ms / 1000

    def _deadline(self, context: Context, timeout_ms: int = 0) -> float:
        """The request's deadline in monotonic seconds: what the call and the turn allow, within the server's bounds."""
        turn_s = timeout_ms / 1000 if timeout_ms else None
        return asyncio.get_running_loop().time() + time_allowed_s(self._relay.settings, context.time_remaining(), turn_s)


def _is_forwarded(context: Context) -> bool:
    """Whether another gateway asks, because it takes this one for the owner."""
    return FORWARDED_METADATA in ((key, value) for key, value in context.invocation_metadata() or ())


async def _stream(reader: FrameReader, context: Context, coalesce_s: float, note: Callable[[Frame], None] | None = None) -> None:
    """Writes the reader's frames; it is closed when they end, and at once when the call does."""
    context.add_done_callback(lambda _: reader.close())  # type: ignore[arg-type]  # the stubs want a class of their own
    try:
        async for frames in reader.batches(coalesce_s):
            if note is not None:
                for frame in frames:
                    note(frame)
            for message in messages(frames):
                await context.write(message)
    finally:
        reader.close()
