# Generated from async_client.py by tools/generate_sync_client.py (`make sync-client`). Do not edit.
"""The client: one method for each thing that a gateway does."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.client import requests, results
from kvrelay.client import sync_transport as transport
from kvrelay.client.addresses import DEFAULT_TIMEOUT_S, Addresses
from kvrelay.client.api_keys import Metadata, call_metadata, with_metadata
from kvrelay.client.stream_state import StreamState, call_error, unreachable
from kvrelay.client.sync_conversation import Conversation
from kvrelay.client.sync_stream import Stream
from kvrelay.client.tls import TLS
from kvrelay.network.exposure import CREDENTIALS_NAME, INSECURE_NAME
from kvrelay.security.credentials import ChannelCredentials
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Client:
    """Talks to a cluster through its gateways.

        with Client("127.0.0.1:50050") as client:
            for delta in client.generate("Once upon a time", max_tokens=64):
                print(delta.text, end="")

    Every call has a timeout and raises the errors of `kvrelay.errors`.

    Args:
        address: host:port of gateways: one, separated by commas, or a sequence. When one does not
            answer, the client asks the next. The default port is 50050.
        timeout_s: default of all calls.
        use_proxy: connect through the HTTP proxy of the environment (https_proxy and the like).
        tls: encrypts connections and checks gateways' certificates. Default: plain text.
        api_key: says who calls. Without TLS, only gateways on this machine get it.

    Raises:
        ConfigError: an address or the key is malformed, or the key would go over a network in plain
            text. It is also a ValueError.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        use_proxy: bool = False,
        tls: TLS | None = None,
        api_key: str | None = None,
    ) -> None:
        self._addresses = Addresses(address)
        self._metadata: Metadata | None = None
        if api_key is not None:
            self._metadata = call_metadata(
                api_key, self._addresses.all, uses_proxy=use_proxy, is_encrypted=tls is not None
            )
        self._timeout_s = timeout_s
        self._use_proxy = use_proxy
        self._lock = threading.Lock()  # several threads may share a blocking client
        self._tls = tls
        self._channels: dict[str, tuple[ChannelCredentials | None, transport.Channel]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections and running streams."""
        channels, self._channels = self._channels, {}
        for _, channel in channels.values():
            channel.close()

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
        **sampling: Unpack[requests.SamplingOptions],
    ) -> Stream:
        """Continues a prompt: text, chat messages or token ids. The first read sends the request.

        Args:
            prompt, messages, token_ids: exactly one of them.
            model: optional when the cluster serves one model.
            tenant: separates prefix caches and idempotency keys.
            resumable: reconnect to any gateway until the timeout. No token is lost or repeated.
            idempotency_key: a second request with the same key joins the first.
            coalesce_ms: how long the gateway may gather tokens into a delta, 0 to 50. None: its
                default.
            timeout_s: deadline of the whole request.
            **sampling: see `SamplingOptions`.

        Raises:
            InvalidRequestError: an argument is invalid. Reading the stream raises all other errors.
        """
        request = requests.generate_request(
            requests.prompt_field(prompt, messages, token_ids),
            model=model,
            tenant=tenant,
            resumable=resumable,
            idempotency_key=idempotency_key,
            coalesce_ms=coalesce_ms,
            sampling=sampling,
        )
        return self._stream(request, StreamState(), resumable, timeout_s)

    def complete(self, prompt: str | None = None, **arguments: Unpack[requests.GenerateOptions]) -> results.Completion:
        """Takes the arguments of `generate` and returns the whole output."""
        with self.generate(prompt, **arguments) as stream:
            return stream.completion()

    def resume(
        self, request_id: str, from_index: int = 0, *, coalesce_ms: int | None = None, timeout_s: float | None = None
    ) -> Stream:
        """Streams a request's output again from token `from_index`, and follows it while it runs.

        The first read raises RequestNotFoundError for an unknown request.
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
        **sampling: Unpack[requests.SamplingOptions],
    ) -> Conversation:
        """Opens a conversation, whose KV stays on one decode worker. `timeout_s` is each turn's."""
        make_request = functools.partial(requests.converse_request, model=model, tenant=tenant, coalesce_ms=coalesce_ms)
        return Conversation(self._stub, self._addresses, make_request, timeout_s or self._timeout_s, sampling)

    def get_request(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestInfo:
        """Returns a request's state. Raises RequestNotFoundError."""
        message = inference_pb2.GetRequestRequest(request_id=request_id)
        response = self._call(lambda stub: stub.GetRequest, message, timeout_s)
        return results.request_info_from_pb(response.request)

    def list_requests(
        self, *, page_size: int = 100, page_token: str = "", active_only: bool = False, timeout_s: float | None = None
    ) -> results.RequestPage:
        """Lists known requests, newest first."""
        message = inference_pb2.ListRequestsRequest(page_size=page_size, page_token=page_token, active_only=active_only)
        response = self._call(lambda stub: stub.ListRequests, message, timeout_s)
        return results.request_page_from_pb(response)

    def timeline(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestTimeline:
        """Returns the timeline of a recent request. Raises RequestNotFoundError."""
        message = inference_pb2.GetTimelineRequest(request_id=request_id)
        response = self._call(lambda stub: stub.GetTimeline, message, timeout_s)
        return results.request_timeline_from_pb(response)

    def cancel(self, request_id: str, *, timeout_s: float | None = None) -> results.RequestState:
        """Ends a request, unless it has ended, and returns its state. Raises RequestNotFoundError."""
        message = inference_pb2.CancelRequestRequest(request_id=request_id)
        response = self._call(lambda stub: stub.CancelRequest, message, timeout_s)
        return results.request_state_from_pb(response.state)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Iterable[requests.Message] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Returns the token ids of a text or a chat."""
        message = requests.tokenize_request(text, messages, model)
        response = self._call(lambda stub: stub.Tokenize, message, timeout_s)
        return list(response.token_ids)

    def detokenize(
        self,
        token_ids: Iterable[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids."""
        message = requests.detokenize_request(token_ids, model, keep_special_tokens)
        response = self._call(lambda stub: stub.Detokenize, message, timeout_s)
        return response.text

    def list_models(self, *, timeout_s: float | None = None) -> list[results.ServedModel]:
        """Lists the models of live workers."""
        message = inference_pb2.ListModelsRequest()
        response = self._call(lambda stub: stub.ListModels, message, timeout_s)
        return [results.served_model_from_pb(model) for model in response.models]

    def cluster(self, *, timeout_s: float | None = None) -> results.Cluster:
        """Returns gateways, workers and their load."""
        message = inference_pb2.GetClusterRequest()
        response = self._call(lambda stub: stub.GetCluster, message, timeout_s)
        return results.cluster_from_pb(response)

    def health(self, *, timeout_s: float | None = None) -> results.Health:
        """Asks the health service of the first gateway that answers."""
        message = health_pb2.HealthCheckRequest()
        address, response = self._ask(self._health_check, message, timeout_s)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            return results.Health(False, address)
        insecure = self._serves(INSECURE_NAME, False, address, timeout_s)
        has_good_files = self._serves(CREDENTIALS_NAME, True, address, timeout_s)
        return results.Health(True, address, insecure, not has_good_files)

    def _serves(self, name: str, default: bool, address: str, timeout_s: float | None) -> bool:
        """`default` for an unknown name."""
        message = health_pb2.HealthCheckRequest(service=name)
        try:
            answer: Any = self._health_check(address)(message, timeout=timeout_s or self._timeout_s)
        except transport.RpcError:
            return default
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _stream(
        self,
        request: inference_pb2.GenerateRequest | inference_pb2.ResumeRequest,
        state: StreamState,
        resumable: bool,
        timeout_s: float | None,
    ) -> Stream:
        return Stream(self._stub, self._addresses, request, state, resumable, timeout_s or self._timeout_s)

    def _call(
        self,
        method: Callable[[transport.Stub], transport.UnaryMethod[RequestT, ResponseT]],
        message: RequestT,
        timeout_s: float | None,
    ) -> ResponseT:
        _, response = self._ask(lambda address: method(self._stub(address)), message, timeout_s)
        return response

    def _ask(
        self,
        method: Callable[[str], transport.UnaryMethod[RequestT, ResponseT]],
        message: RequestT,
        timeout_s: float | None,
    ) -> tuple[str, ResponseT]:
        """Asks addresses in turn. Returns the one that answered, and its answer."""
        for number in range(len(self._addresses.all)):
            address = self._addresses.current
            try:
                return address, method(address)(message, timeout=timeout_s or self._timeout_s)
            except transport.RpcError as failure:
                last = number == len(self._addresses.all) - 1
                if not unreachable(failure) or last:
                    # Frames hold the call, and so the connection.
                    raise call_error(failure.with_traceback(None), self._addresses.all) from None
                self._addresses.move_on()
        raise AssertionError("a client has at least one address")

    def _stub(self, address: str) -> transport.Stub:
        plain = inference_pb2_grpc.InferenceServiceStub(self._channel(address))
        stub: transport.Stub = with_metadata(plain, self._metadata)
        return stub

    def _health_check(self, address: str) -> Any:
        stub: Any = health_pb2_grpc.HealthStub(self._channel(address))
        return stub.Check

    def _channel(self, address: str) -> transport.Channel:
        with self._lock:
            credentials = None if self._tls is None else self._tls.credentials()
            known = self._channels.get(address)
            if known is not None and known[0] == credentials:
                return known[1]
            # Streams go on with a channel that is replaced.
            channel = transport.create_channel(address, use_proxy=self._use_proxy, credentials=credentials)
            self._channels[address] = (credentials, channel)
            return channel
