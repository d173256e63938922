"""The asyncio client: one method for each thing that a gateway does. Knows nothing of how a stream or a conversation goes on."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay import rpc
from kvrelay.client import requests, results
from kvrelay.client.addresses import DEFAULT_TIMEOUT_S, Addresses
from kvrelay.client.async_conversation import AsyncConversation
from kvrelay.client.async_stream import AsyncStream
from kvrelay.client.stream_state import StreamState, call_error, unreachable
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

ResponseT = TypeVar("ResponseT")


class AsyncClient:
    """Talks to a cluster through its gateways.

        async with AsyncClient("127.0.0.1:50050") as client:
            async for delta in client.generate("Once upon a time", max_tokens=64):
                print(delta.text, end="")

    Every method raises the errors of `kvrelay.errors` and nothing of gRPC. Every call has a timeout.

    Args:
        address: host:port of a gateway; several (a sequence, or separated by commas) are asked in turn when one does not answer.
        timeout_s: of calls that are given none.
    """

    def __init__(self, address: str | Sequence[str], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._addresses = Addresses(address)
        self._timeout_s = timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; running streams end."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Iterable[requests.Message] | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        tenant: str = "",
        resumable: bool = False,
        idempotency_key: str | None = None,
        coalesce_ms: int | None = None,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncStream:
        """Continues a prompt: text, chat messages or token ids. The call begins with the first item that is asked for.

        Args:
            prompt, messages, token_ids: exactly one of them.
            model: may be empty when the cluster serves one model only.
            tenant: separates prefix caches and idempotency keys.
            resumable: a lost connection is made again, to any of the addresses, until the timeout; nothing is lost or repeated.
            idempotency_key: a second request with the same key joins the first.
            coalesce_ms: for how long tokens may be gathered into one delta, 0 to 50. None: as the gateway is set, usually 0.
            timeout_s: of the whole request; becomes its deadline in the cluster.
            **sampling: fields of `kvrelay.sampling_params.SamplingParams`, such as temperature or max_tokens.

        Raises:
            InvalidRequestError: a value cannot be sent. All other errors come with the stream's items.
        """
        request = requests.generate_request(
            prompt,
            messages,
            token_ids,
            model=model,
            tenant=tenant,
            resumable=resumable,
            idempotency_key=idempotency_key,
            coalesce_ms=coalesce_ms,
            sampling=sampling,
        )
        return self._stream(request, StreamState(), resumable, timeout_s)

    async def complete(self, prompt: str | None = None, **arguments: Any) -> results.Completion:
        """As `generate`, with the same arguments, but waits for all of it."""
        async with self.generate(prompt, **arguments) as stream:
            return await stream.completion()

    def resume(
        self, request_id: str, from_index: int = 0, *, coalesce_ms: int | None = None, timeout_s: float | None = None
    ) -> AsyncStream:
        """Streams a request's output again from any index, and follows it while it is still running.

        Raises:
            RequestNotFoundError: with the first item: no such request is known any more.
        """
        request = requests.resume_request(request_id, from_index, coalesce_ms)
        return self._stream(request, StreamState(from_index), True, timeout_s)

    def converse(
        self,
        *,
        model: str = "",
        tenant: str = "",
        coalesce_ms: int | None = None,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> AsyncConversation:
        """A conversation whose KV stays warm on one decode worker; `timeout_s` is the default of a turn."""
        return AsyncConversation(
            self._stub,
            self._addresses,
            model=model,
            tenant=tenant,
            coalesce_ms=coalesce_ms,
            timeout_s=timeout_s or self._timeout_s,
            sampling=sampling,
        )

    async def get_request(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestInfo:
        """A request's state. Raises RequestNotFoundError."""
        message = inference_pb2.GetRequestRequest(request_id=request_id)
        response = await self._call(lambda stub, timeout: stub.GetRequest(message, timeout=timeout), timeout_s)
        return results.request_info_from_pb(response.request)

    async def list_requests(
        self, *, page_size: int = 100, page_token: str = "", active_only: bool = False, timeout_s: float | None = None
    ) -> results.RequestPage:
        """Known requests, newest first."""
        message = inference_pb2.ListRequestsRequest(page_size=page_size, page_token=page_token, active_only=active_only)
        response = await self._call(lambda stub, timeout: stub.ListRequests(message, timeout=timeout), timeout_s)
        return results.request_page_from_pb(response)

    async def timeline(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestTimeline:
        """What happened when to one of the last requests. Raises RequestNotFoundError."""
        message = inference_pb2.GetTimelineRequest(request_id=request_id)
        response = await self._call(lambda stub, timeout: stub.GetTimeline(message, timeout=timeout), timeout_s)
        return results.request_timeline_from_pb(response)

    async def cancel(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestState:
        """Ends a request; its state afterwards. Ending one that has ended is no error. Raises RequestNotFoundError."""
        message = inference_pb2.CancelRequestRequest(request_id=request_id)
        response = await self._call(lambda stub, timeout: stub.CancelRequest(message, timeout=timeout), timeout_s)
        return results.request_state_from_pb(response.state)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Iterable[requests.Message] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids of a text or of a chat."""
        message = requests.tokenize_request(text, messages, model)
        response = await self._call(lambda stub, timeout: stub.Tokenize(message, timeout=timeout), timeout_s)
        return list(response.token_ids)

    async def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Text of token ids."""
        message = requests.detokenize_request(token_ids, model, keep_special_tokens)
        response = await self._call(lambda stub, timeout: stub.Detokenize(message, timeout=timeout), timeout_s)
        return response.text

    async def list_models(self, *, timeout_s: float | None = None) -> list[results.ServedModel]:
        """Models that live workers serve."""
        message = inference_pb2.ListModelsRequest()
        response = await self._call(lambda stub, timeout: stub.ListModels(message, timeout=timeout), timeout_s)
        return [results.served_model_from_pb(model) for model in response.models]

    async def cluster(self, *, timeout_s: float | None = None) -> results.Cluster:
        """Gateways, workers and their load."""
        message = inference_pb2.GetClusterRequest()
        response = await self._call(lambda stub, timeout: stub.GetCluster(message, timeout=timeout), timeout_s)
        return results.cluster_from_pb(response)

    async def health(self, *, timeout_s: float | None = None) -> results.Health:
        """What the health service of the process says that answers."""

        async def check(address: str, limit_s: float) -> results.Health:
            stub: Any = health_pb2_grpc.HealthStub(self._channel(address))
            response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=limit_s)
            return results.Health(response.status == health_pb2.HealthCheckResponse.SERVING, address)

        return await self._ask(check, timeout_s)

    def _stream(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.ResumeRequest,
        state: StreamState,
        resumable: bool,
        timeout_s: float | None,
    ) -> AsyncStream:
        return AsyncStream(self._stub, self._addresses, request, state, resumable, timeout_s or self._timeout_s)

    async def _call(
        self,
        method: Callable[[inference_pb2_grpc.InferenceServiceAsyncStub, float], Awaitable[ResponseT]],
        timeout_s: float | None,
    ) -> ResponseT:
        return await self._ask(lambda address, timeout: method(self._stub(address), timeout), timeout_s)

    async def _ask(self, call: Callable[[str, float], Awaitable[ResponseT]], timeout_s: float | None) -> ResponseT:
        """Asks one address after the other until one answers."""
        for number in range(len(self._addresses.all)):
            try:
                return await call(self._addresses.current, timeout_s or self._timeout_s)
            except grpc.aio.AioRpcError as failure:
                last = number == len(self._addresses.all) - 1
                if not unreachable(failure) or last:
                    raise call_error(failure, self._addresses.all) from None
                self._addresses.move_on()
        raise AssertionError("a client has at least one address")

    def _stub(self, address: str) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self._channel(address))

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.create_channel(address)
        return self._channels[address]
