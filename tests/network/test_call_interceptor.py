"""The guard runs before all else of a call; withdrawal and expiry reach the client typed."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from kvrelay.errors import AccessDeniedError, InvalidRequestError, UnauthenticatedError
from kvrelay.network import rpc
from kvrelay.security.guard import TENANT, Guard
from kvrelay.security.method_rules import Rule
from kvrelay.security.principal import LOCAL, Principal, Role, current_principal
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.wire.errors import error_of_rpc
from tests.security.test_guard import Tokens

SERVICE = "kvrelay.v1.InferenceService"
KEY = (("authorization", "Bearer key"),)


class Service(inference_pb2_grpc.InferenceServiceServicer):
    """Counts what reaches it. Resume streams until it is ended."""

    def __init__(self) -> None:
        self.principals: list[Principal] = []
        self.started = asyncio.Event()
        self.ended = asyncio.Event()

    async def GetRequest(self, request: pb.GetRequestRequest, context: object) -> pb.GetRequestResponse:
        self.principals.append(current_principal())
        return pb.GetRequestResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        self.principals.append(current_principal())
        return pb.ListModelsResponse()

    async def Resume(self, request: pb.ResumeRequest, context: object) -> AsyncIterator[pb.ResumeResponse]:
        self.principals.append(current_principal())
        try:
            while True:
                yield pb.ResumeResponse()
                self.started.set()
                await asyncio.sleep(0)
        finally:
            self.ended.set()

    async def Converse(self, requests: AsyncIterator[pb.ConverseRequest], context: object) -> AsyncIterator[Any]:
        async for _ in requests:
            self.principals.append(current_principal())
            yield pb.ConverseResponse()


class Server:
    def __init__(self) -> None:
        self.now = 0.0
        self.service = Service()  # type: ignore[abstract]
        self.alice = Principal(frozenset({Role.CLIENT}), "alice", "alice-1", proof="a", expires_at_s=100.0)
        self.tokens = Tokens({"key": self.alice})
        rule = Rule(frozenset({Role.CLIENT}))
        rules = {f"/{SERVICE}/{method}": rule for method in ("GetRequest", "Resume", "Converse")}
        self.guard = Guard(rules, [self.tokens], lambda _: frozenset(), clock=lambda: self.now)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async for channel in _serve(server.service, server.guard):
        yield channel


async def _serve(service: Service, guard: Guard | None) -> AsyncIterator[grpc.aio.Channel]:
    grpc_server = rpc.create_server(guard=guard)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, grpc_server)
    bound = rpc.bind_server(grpc_server, "127.0.0.1", 0, [SERVICE])
    await grpc_server.start()
    async with rpc.create_channel(f"127.0.0.1:{bound.port}") as channel:
        yield channel
    await grpc_server.stop(None)


async def answers_of(call: Any) -> list[Any]:
    return [response async for response in call] if hasattr(call, "__aiter__") else [await call]


async def failure_of(call: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await answers_of(call)
    return error_of_rpc(failure.value)


async def test_without_a_guard_every_caller_is_local() -> None:
    service = Service()  # type: ignore[abstract]
    async for channel in _serve(service, None):
        await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
    assert service.principals == [LOCAL]


async def test_without_a_guard_a_caller_may_speak_for_one_tenant() -> None:
    service = Service()  # type: ignore[abstract]
    async for channel in _serve(service, None):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await stub.ListModels(pb.ListModelsRequest(), metadata=((TENANT, b"alice"),))
        await stub.ListModels(pb.ListModelsRequest())
        call = stub.ListModels(pb.ListModelsRequest(), metadata=((TENANT, b""),))
        assert isinstance(await failure_of(call), InvalidRequestError)
    assert service.principals == [LOCAL.speaking_for("alice"), LOCAL]
    assert not service.principals[0].may_see("bob")


async def test_handlers_see_the_principal(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    await stub.GetRequest(pb.GetRequestRequest(), metadata=KEY)
    call = stub.Converse(iter([pb.ConverseRequest(), pb.ConverseRequest()]), metadata=KEY)
    assert [response async for response in call] == [pb.ConverseResponse()] * 2
    assert server.service.principals == [server.alice] * 3


async def test_calls_without_a_key_reach_no_handler(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for call in (
        stub.GetRequest(pb.GetRequestRequest()),
        stub.Resume(pb.ResumeRequest()),
        stub.Converse(),  # sends nothing: gRPC fails a write to a refused call with a status of its own
    ):
        assert isinstance(await failure_of(call), UnauthenticatedError)
    assert server.service.principals == []


async def test_a_method_without_a_rule_reaches_no_handler(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    assert isinstance(await failure_of(stub.ListModels(pb.ListModelsRequest(), metadata=KEY)), AccessDeniedError)
    assert server.service.principals == []


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    unknown: Any = channel.unary_unary("/x.Y/Z")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await unknown(b"")
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_of_an_unknown_caller_is_not_even_read(channel: grpc.aio.Channel) -> None:
    get: Any = channel.unary_unary(f"/{SERVICE}/GetRequest")
    assert isinstance(await failure_of(get(b"\xff\xff")), UnauthenticatedError)
    assert isinstance(await failure_of(get(b"\xff\xff", metadata=KEY)), InvalidRequestError)


async def test_a_stream_ends_typed_when_its_key_is_withdrawn(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    failing = asyncio.create_task(failure_of(stub.Resume(pb.ResumeRequest(), metadata=KEY)))
    await server.service.started.wait()
    server.tokens.principals.clear()
    assert server.guard.end_withdrawn() == 1
    failure = await failing
    assert isinstance(failure, UnauthenticatedError)
    assert "withdrawn" in failure.message
    await server.service.ended.wait()


async def test_a_stream_takes_no_message_after_the_expiry(server: Server, channel: grpc.aio.Channel) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    call = stub.Converse(metadata=KEY)
    await call.write(pb.ConverseRequest())
    assert await call.read() == pb.ConverseResponse()
    server.now = 100.0
    await call.write(pb.ConverseRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    failure = error_of_rpc(caught.value)
    assert isinstance(failure, UnauthenticatedError)
    assert "expired" in failure.message
    assert len(server.service.principals) == 1


class Large:
    """Stands for a message, which cannot be watched."""


class FailingService(Service):
    """Its handlers fail while they hold something large, for a reason that held it too."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[Large]] = []

    async def GetRequest(self, request: pb.GetRequestRequest, context: object) -> pb.GetRequestResponse:
        self._fail()
        raise AssertionError("it failed before")

    async def Resume(self, request: pb.ResumeRequest, context: object) -> AsyncIterator[pb.ResumeResponse]:
        self._fail()
        yield pb.ResumeResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        self._parse(Large())
        raise AssertionError("it failed before")

    def _fail(self) -> None:
        large = Large()
        try:
            self._parse(large)
        except ValueError as cause:
            raise InvalidRequestError("x", "is wrong") from cause

    def _parse(self, large: Large) -> None:
        self.held.append(weakref.ref(large))
        raise ValueError("no message")


async def test_an_errors_frames_are_not_kept_until_garbage_is_collected() -> None:
    service = FailingService()  # type: ignore[abstract]
    async for channel in _serve(service, None):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        gc.disable()
        try:
            for call in (
                stub.GetRequest(pb.GetRequestRequest()),
                stub.Resume(pb.ResumeRequest()),
                stub.ListModels(pb.ListModelsRequest()),
            ):
                await failure_of(call)
            assert len(service.held) == 3
            async with asyncio.timeout(20):  # the last handler's task ends behind its answer
                while any(reference() is not None for reference in service.held):  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0)
        finally:
            gc.enable()
