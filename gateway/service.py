"""InferenceService: the RPCs that clients call."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from gateway.api.conversation_stream import ConversationStream
from gateway.gateway import Gateway
from gateway.requests.known_requests import request_info, state_to_pb
from gateway.requests.request_validation import check_token_ids, deadline_of, parse_messages
from gateway.requests.tenants import take_session_key
from gateway.requests.turns import Turns
from gateway.resume.stored_output import FrameReader
from gateway.state.other_gateways import FORWARDED_METADATA
from gateway.streaming.frames import Frame, messages
from gateway.text.texts import TokenBound
from gateway.views import cluster_view
from gateway.workers.served_models import ModelLimits
from kvrelay.config.settings import MAX_COALESCE_MS
from kvrelay.core.quoting import shortened
from kvrelay.errors import InvalidRequestError
from kvrelay.security.principal import Role, current_principal
from kvrelay.state.request_record import RequestSummary
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
LISTED_AT_ONCE = 50
MAX_LISTED_ERROR_CHARACTERS = 256
MAX_LISTING = 2
MAX_WAITING_LISTS = 64
MODEL_WAIT_S = 5.0
MAX_TOKENS_PER_CALL = 65_536
"""Bound of Tokenize and Detokenize if the model's context is shorter."""

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._preparation = gateway.preparation
        self._listing = Turns("a list of requests", MAX_LISTING, MAX_WAITING_LISTS)

    # The three responses have the same wire format, so each frame is encoded once and reused
    # by every reader.

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        take_session_key(context.invocation_metadata())
        coalesce_s = self._coalesce_s(request)
        reader = await self._gateway.generation.open(request, self._deadline(context))
        await _stream(reader, context, coalesce_s)

    async def Converse(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.ConverseRequest], context: Context
    ) -> None:
        take_session_key(context.invocation_metadata())
        stream = ConversationStream(self._preparation, self._gateway.starter)
        async for turn in request_iterator:
            coalesce_s = self._coalesce_s(turn)
            reader = await stream.begin_turn(turn, self._deadline(context, turn.timeout_ms))
            await _stream(reader, context, coalesce_s, stream.on_frame)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        coalesce_s = self._coalesce_s(request)
        reader = await self._gateway.outputs.open_reader(
            request.request_id, request.from_index, forwarded=_is_forwarded(context)
        )
        await _stream(reader, context, coalesce_s)

    async def GetRequest(self, request: pb.GetRequestRequest, context: Context) -> pb.GetRequestResponse:
        record = await self._gateway.known_requests.get(request.request_id)
        return pb.GetRequestResponse(request=request_info(record))

    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        page_size = request.page_size or DEFAULT_PAGE_SIZE
        if page_size > MAX_PAGE_SIZE:
            raise InvalidRequestError("page_size", f"is {page_size}; it must lie between 1 and {MAX_PAGE_SIZE}")
        async with self._listing.turn():
            page = await self._gateway.known_requests.read_page(page_size, request.page_token, request.active_only)
            response = pb.ListRequestsResponse(next_page_token=page.next_page_token)
            for begin in range(0, len(page.requests), LISTED_AT_ONCE):
                response.requests.extend(map(_listed_info, page.requests[begin : begin + LISTED_AT_ONCE]))
                await asyncio.sleep(0)  # others' messages come between
            return response

    async def CancelRequest(self, request: pb.CancelRequestRequest, context: Context) -> pb.CancelRequestResponse:
        state = await self._gateway.cancellation.cancel(request.request_id, forwarded=_is_forwarded(context))
        return pb.CancelRequestResponse(state=state_to_pb(state))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        limits = await self._preparation.models.wait_and_select(request.model, MODEL_WAIT_S)
        tokenizer = await self._preparation.tokenizers.get(limits.model.fingerprint)
        deadline, texts = self._deadline(context), self._preparation.texts
        match request.WhichOneof("input"):
            case "text":
                token_ids = await texts.encode(tokenizer, request.text, _bound_of_call("input.text", limits), deadline)
            case "chat":
                messages = parse_messages(request.chat.messages, "input.chat.messages")
                bound = _bound_of_call("input.chat", limits)
                token_ids = await texts.encode_chat(tokenizer, messages, "input.chat.messages", bound, deadline)
            case _:
                raise InvalidRequestError("input", "is absent; send text or chat")
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        limits = await self._preparation.models.wait_and_select(request.model, MODEL_WAIT_S)
        bound = _bound_of_call("token_ids", limits)
        if len(request.token_ids) > bound.max_tokens:
            raise bound.error(f"{len(request.token_ids)} tokens")
        check_token_ids(request.token_ids, "token_ids", limits.model)
        tokenizer = await self._preparation.tokenizers.get(limits.model.fingerprint)
        deadline, keep = self._deadline(context), request.keep_special_tokens
        text = await self._preparation.texts.decode(tokenizer, request.token_ids, deadline, keep_special_tokens=keep)
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=await cluster_view.served_models(self._gateway))

    async def GetTimeline(self, request: pb.GetTimelineRequest, context: Context) -> pb.GetTimelineResponse:
        return await self._gateway.timeline_view.get(request.request_id, forwarded=_is_forwarded(context))

    async def GetCluster(self, request: pb.GetClusterRequest, context: Context) -> pb.GetClusterResponse:
        return await cluster_view.cluster(self._gateway)

    def _coalesce_s(self, request: pb.GenerateRequest | pb.ConverseRequest | pb.ResumeRequest) -> float:
        if not request.HasField("coalesce_ms"):
            return self._gateway.settings.coalesce_ms / 1000
        if request.coalesce_ms > MAX_COALESCE_MS:
            raise InvalidRequestError(
                "coalesce_ms", f"is {request.coalesce_ms}; it must lie between 0 and {MAX_COALESCE_MS}"
            )
        return request.coalesce_ms / 1000

    def _deadline(self, context: Context, timeout_ms: int = 0) -> float:
        """In monotonic seconds."""
        turn_s = timeout_ms / 1000 if timeout_ms else None
        return deadline_of(self._gateway.settings, context.time_remaining(), turn_s)


def _listed_info(record: RequestSummary) -> pb.RequestInfo:
    info = request_info(record)
    info.error_message = shortened(info.error_message, MAX_LISTED_ERROR_CHARACTERS)
    return info


def _bound_of_call(field: str, limits: ModelLimits) -> TokenBound:
    """Clients tokenize to cut texts to fit, so more than the context is allowed."""
    max_tokens = max(limits.max_tokens, MAX_TOKENS_PER_CALL)
    return TokenBound(field, max_tokens, f"at most {max_tokens} tokens are taken in one call, so send it in parts")


def _is_forwarded(context: Context) -> bool:
    if Role.GATEWAY not in current_principal().roles:
        return False
    return FORWARDED_METADATA in ((key, value) for key, value in context.invocation_metadata() or ())


async def _stream(
    reader: FrameReader, context: Context, coalesce_s: float, on_frame: Callable[[Frame], None] | None = None
) -> None:
    """Closes the reader at once when the call ends."""
    context.add_done_callback(lambda _: reader.close())  # type: ignore[arg-type]  # the stubs want a class of their own
    try:
        async for frames in reader.batches(coalesce_s):
            if on_frame is not None:
                for frame in frames:
                    on_frame(frame)
            for message in messages(frames):
                await context.write(message)
    finally:
        reader.close()
