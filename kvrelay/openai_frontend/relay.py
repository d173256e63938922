"""Says to a gateway for which client smg asks: smg itself sends neither a key nor a tenant.

    smg ── VllmEngine on loopback ──▶ relay ── the same, with credentials ──▶ gateway

Messages pass one at a time, as bytes.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError
from smg_grpc_proto import vllm_engine_pb2

from kvrelay.core.bounds import check_count
from kvrelay.core.trace_context import METADATA_KEY
from kvrelay.errors import AccessDeniedError, InvalidRequestError, UnavailableError
from kvrelay.network.connection_limits import ConnectionLimits
from kvrelay.network.host_port import join_host_port
from kvrelay.network.loopback_peer import is_of_this_user
from kvrelay.network.own_address import LOOPBACK
from kvrelay.network.rpc import bind_port, create_server
from kvrelay.openai_frontend.gateway_channel import GatewayChannel, Metadata
from kvrelay.openai_frontend.open_requests import FRONT_ITSELF, Client, OpenRequests
from kvrelay.security import guard
from kvrelay.security.method_rules import GRPC_RULES
from kvrelay.security.principal import Principal, Role
from kvrelay.wire.errors import DETAILS_METADATA_KEY

SERVICE_NAME = "vllm.grpc.engine.VllmEngine"
GENERATE_TIMEOUT_S = 3600.0
"""The gateway ends requests sooner: --default-timeout-ms."""
TOKENIZER_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 10.0
STOP_GRACE_S = 1.0
MAX_ABORTED = 1024
MAX_STREAMS = 4096
"""smg has one connection for all requests."""

_GENERATE, _ABORT, _EMBED, _TOKENIZER = (
    f"/{SERVICE_NAME}/{name}" for name in ("Generate", "Abort", "Embed", "GetTokenizer")
)
_BY_ID = frozenset({_GENERATE, _ABORT, _EMBED})
_SMG = Principal(frozenset({Role.FRONT}), "", "smg")

_pb: Any = vllm_engine_pb2  # it has no usable stubs
_log = structlog.get_logger(__name__)


class Relay:
    def __init__(self, gateway: GatewayChannel, requests: OpenRequests) -> None:
        self._gateway = gateway
        self._requests = requests
        self._running: dict[str, Client] = {}
        """By smg's ids, for Abort."""
        self._guard = _SmgGuard()
        self._is_refused = False
        self._server = create_server(guard=self._guard, limits=ConnectionLimits(max_streams=MAX_STREAMS))
        handlers = {method.rpartition("/")[2]: self._handler_of(method) for method in GRPC_RULES[Role.FRONT]}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        self._guard.port = bind_port(self._server, LOOPBACK, 0, "a port for the relay to a gateway", None)
        self.address = join_host_port(LOOPBACK, self._guard.port)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(STOP_GRACE_S)
        await self._gateway.close()

    def _handler_of(self, method: str) -> Any:
        if method == _GENERATE:
            return grpc.unary_stream_rpc_method_handler(self._generate)
        if method == _TOKENIZER:
            return grpc.unary_stream_rpc_method_handler(self._tokenizer)
        if method == _ABORT:
            return grpc.unary_unary_rpc_method_handler(self._abort)
        if method == _EMBED:
            return grpc.unary_unary_rpc_method_handler(self._embed)

        async def ask(data: bytes, context: Any) -> bytes:
            return await self._ask(method, data, FRONT_ITSELF, context)

        return grpc.unary_unary_rpc_method_handler(ask)

    async def _generate(self, data: bytes, context: Any) -> None:
        request_id = _read(_pb.GenerateRequest, data).request_id
        client = self._client_of(request_id)
        self._running[request_id] = client
        try:
            await self._stream(_GENERATE, data, client, context, GENERATE_TIMEOUT_S, request_id)
        finally:
            self._running.pop(request_id, None)

    async def _tokenizer(self, data: bytes, context: Any) -> None:
        await self._stream(_TOKENIZER, data, FRONT_ITSELF, context, TOKENIZER_TIMEOUT_S)

    async def _embed(self, data: bytes, context: Any) -> bytes:
        return await self._ask(_EMBED, data, self._client_of(_read(_pb.EmbedRequest, data).request_id), context)

    async def _abort(self, data: bytes, context: Any) -> bytes:
        request_ids = _read(_pb.AbortRequest, data).request_ids
        check_count("request_ids", request_ids, MAX_ABORTED)
        for request_id in request_ids:
            if (client := self._running.get(request_id)) is not None:
                one = _pb.AbortRequest(request_ids=[request_id]).SerializeToString()
                await self._ask(_ABORT, one, client, context)
        return bytes(_pb.AbortResponse().SerializeToString())

    def _client_of(self, request_id: str) -> Client:
        client = self._requests.client_of(request_id)
        if client is None:
            raise AccessDeniedError(
                "no HTTP request in progress has this request id; ask through the front's HTTP port"
            )
        return client

    async def _stream(
        self, method: str, data: bytes, client: Client, context: Any, timeout_s: float, request_id: str = ""
    ) -> None:
        async with self._gateway.calling() as channel:
            begin: Any = channel.unary_stream(method)
            call = begin(data, timeout=_timeout_s(context, timeout_s), metadata=self._metadata_of(client, context))
            try:
                with self._requests.cancelling(request_id, call.cancel):
                    while (message := await call.read()) is not grpc.aio.EOF:
                        await context.write(message)
            except grpc.aio.AioRpcError as failure:
                await self._abort_as(failure, client, context)
            except asyncio.CancelledError:
                await _abort_if_the_call_was_cancelled(context)
                raise
            finally:
                call.cancel()  # smg may have hung up
        self._note(client, is_refused=False)

    async def _ask(self, method: str, data: bytes, client: Client, context: Any) -> bytes:
        async with self._gateway.calling() as channel:
            begin: Any = channel.unary_unary(method)
            timeout_s = _timeout_s(context, CALL_TIMEOUT_S)
            try:
                answer: bytes = await begin(data, timeout=timeout_s, metadata=self._metadata_of(client, context))
            except grpc.aio.AioRpcError as failure:
                await self._abort_as(failure, client, context)
            except asyncio.CancelledError:
                await _abort_if_the_call_was_cancelled(context)
                raise
        self._note(client, is_refused=False)
        return answer

    def _metadata_of(self, client: Client, context: Any) -> Metadata:
        given = context.invocation_metadata() or ()
        trace = tuple((key, value) for key, value in given if key == METADATA_KEY)
        return (*self._gateway.metadata_of(client), *trace)

    async def _abort_as(self, failure: grpc.aio.AioRpcError, client: Client, context: Any) -> NoReturn:
        """What gRPC says of the network stays here."""
        self._note(client, is_refused=failure.code() in _REFUSALS)
        trailing = tuple(failure.trailing_metadata() or ())
        if failure.code() is grpc.StatusCode.UNAVAILABLE and all(key != DETAILS_METADATA_KEY for key, _ in trailing):
            raise UnavailableError("the gateway cannot be reached now; try again", retry_after_ms=1000) from failure
        await context.abort(failure.code(), failure.details() or "", trailing)
        raise AssertionError("abort raises")

    def _note(self, client: Client, *, is_refused: bool) -> None:
        """Logs once that the gateway does not know the front."""
        if client is not FRONT_ITSELF or is_refused == self._is_refused:
            return
        self._is_refused = is_refused
        if is_refused:
            _log.error(
                "the gateway refuses this front: give a key of role front (--gateway-key-file), or a certificate of "
                "role front (--tls-cert, --tls-key, --tls-ca) and the gateway's --peer-port",
                gateway=self._gateway.address,
            )


_REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class _SmgGuard:
    """Lets in smg alone: by a request's id, or as a process of this user."""

    def __init__(self) -> None:
        self.port = 0

    def check(self, method: str, metadata: guard.Metadata, auth_context: guard.AuthContext, peer: str) -> Principal:
        if method not in GRPC_RULES[Role.FRONT]:
            raise AccessDeniedError(f"{method} is not passed on; call it at a gateway")
        if method not in _BY_ID and not is_of_this_user(peer, self.port):
            raise AccessDeniedError("this port is for smg alone; ask through the front's HTTP port")
        return _SMG

    def following(self, principal: Principal) -> AbstractContextManager[None]:
        return nullcontext()

    def check_expiry(self, principal: Principal) -> None:
        """smg lives as long as the front."""


def _read(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequestError("request", "is no message of VllmEngine; ask through the front's HTTP port") from None


def _timeout_s(context: Any, most_s: float) -> float:
    remaining_s = context.time_remaining()
    return most_s if remaining_s is None else min(remaining_s, most_s)


async def _abort_if_the_call_was_cancelled(context: Any) -> None:
    """Where smg hangs up, the task is cancelled, and not the call alone."""
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        await context.abort(grpc.StatusCode.CANCELLED, "the gateway or the HTTP request ended; try again")


@asynccontextmanager
async def running_relays(gateways: Sequence[GatewayChannel], requests: OpenRequests) -> AsyncIterator[list[str]]:
    """Yields an address for each gateway."""
    async with AsyncExitStack() as stack:
        addresses = []
        for gateway in gateways:
            relay = Relay(gateway, requests)
            stack.push_async_callback(relay.stop)
            await relay.start()
            addresses.append(relay.address)
        yield addresses
