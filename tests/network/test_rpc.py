"""What handlers raise arrives at clients as the same typed error; defects arrive without their
detail.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

from kvrelay import errors
from kvrelay.network import rpc
from kvrelay.runtime.fault_points import InjectedFaultError
from kvrelay.testing.proxy import FaultProxy
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from kvrelay.wire.errors import code_of, error_of, error_of_rpc, status_of

SERVICE = "kvrelay.v1.InferenceService"


def wire_errors() -> list[type[errors.KvrelayError]]:
    """All kinds that a client can get.

    A state store's own ones stay inside the gateway, and injected ones inside tests; private ones
    are what their parents are.
    """
    found, todo = [], [errors.KvrelayError]
    while todo:
        kind = todo.pop()
        found += kind.__subclasses__()
        todo += kind.__subclasses__()
    inside = errors.StartupError | errors.StateLostError | InjectedFaultError
    return [kind for kind in found if not issubclass(kind, inside) and not kind.__name__.startswith("_")]


class Raising(inference_pb2_grpc.InferenceServiceServicer):
    """Raises what the test says, from a unary method and from a stream after its first message."""

    failure: Exception = ValueError("secret")

    async def GetRequest(self, request: object, context: object) -> inference_pb2.GetRequestResponse:
        raise self.failure

    async def Generate(self, request: object, context: object) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse()
        raise self.failure


@pytest.fixture
async def bound() -> AsyncIterator[rpc.BoundServer]:
    server = rpc.create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Raising(), server)  # type: ignore[abstract]
    bound = rpc.bind_server(server, "127.0.0.1", 0, [SERVICE], reflects=True)
    await server.start()
    yield bound
    await server.stop(None)


@pytest.fixture
async def channel(bound: rpc.BoundServer) -> AsyncIterator[grpc.aio.Channel]:
    async with rpc.create_channel(f"127.0.0.1:{bound.port}") as channel:
        yield channel


async def fail_unary(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await inference_pb2_grpc.InferenceServiceStub(channel).GetRequest(inference_pb2.GetRequestRequest(), timeout=30)
    return failure.value


@pytest.mark.parametrize("method", ["GetRequest", "Generate"])
async def test_bytes_that_are_no_message_are_the_clients_mistake(channel: grpc.aio.Channel, method: str) -> None:
    async def garbage() -> AsyncIterator[bytes]:
        yield b"\x0a\x01\xff\xff"

    # no types: the bytes go out as they are
    method_of: Any = channel.stream_stream(f"/{SERVICE}/{method}")
    call = method_of(garbage(), timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    error = error_of_rpc(failure.value)
    assert isinstance(error, errors.InvalidRequestError)
    assert "proto" in error.message


def test_an_error_without_a_code_of_its_own_has_its_bases_code() -> None:
    assert code_of(errors.FrameGapError("gap", 3)) is grpc.StatusCode.UNAVAILABLE
    assert isinstance(error_of(status_of(errors.StateLostError("lost"))), errors.UnavailableError)


@pytest.mark.parametrize("kind", wire_errors())
def test_every_error_has_a_code_of_its_own_reason_and_survives_the_status(kind: type[errors.KvrelayError]) -> None:
    error = kind("field", "is wrong") if issubclass(kind, errors.InvalidRequestError) else kind("what to do")
    assert (code_of(error) is grpc.StatusCode.INTERNAL) == (kind is errors.InternalError)
    again = error_of(status_of(error))
    assert type(again) is kind
    assert again.message == error.message


def test_an_unavailable_error_carries_its_time_to_come_again_where_it_has_one() -> None:
    for retry_after_ms in (None, 0, 1500):
        again = error_of(status_of(errors.UnavailableError("draining", retry_after_ms)))
        assert isinstance(again, errors.UnavailableError)
        assert again.retry_after_ms == retry_after_ms


async def test_a_wrong_field_arrives_with_its_name(channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Raising, "failure", errors.InvalidRequestError("sampling.n", "is 9; it must lie in [1, 8]"))
    failure = await fail_unary(channel)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = error_of_rpc(failure)
    assert isinstance(error, errors.InvalidRequestError)
    assert (error.field, error.problem) == ("sampling.n", "is 9; it must lie in [1, 8]")


async def test_a_stream_that_is_refused_midway_ends_with_retry_info(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Raising, "failure", errors.OverloadedError("busy; come again", 1234))
    call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(), timeout=30)
    assert await call.read() == inference_pb2.GenerateResponse()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    error = error_of_rpc(failure.value)
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_ms == 1234


async def test_a_defect_is_internal_and_its_detail_stays_in_the_log(channel: grpc.aio.Channel) -> None:
    failure = await fail_unary(channel)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (failure.details() or "")
    assert isinstance(error_of_rpc(failure), errors.InternalError)


async def test_a_status_of_grpc_itself_becomes_a_typed_error() -> None:
    async with rpc.create_channel("127.0.0.1:1") as channel:
        assert isinstance(error_of_rpc(await fail_unary(channel)), errors.UnavailableError)


async def test_a_taken_port_stops_the_start_and_says_what_to_do(bound: rpc.BoundServer) -> None:
    with pytest.raises(errors.StartupError, match="--port"):
        rpc.bind_server(rpc.create_server(), "127.0.0.1", bound.port, [])


async def test_health_follows_what_is_set(bound: rpc.BoundServer, channel: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for serving in (True, False):
        await bound.set_serving(serving)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is serving


@pytest.mark.parametrize("service", ["grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"])
async def test_reflection_lists_the_services(channel: grpc.aio.Channel, service: str) -> None:
    ask: Any = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30)
    names = [service.name async for answer in call for service in answer.list_services_response.service]
    assert {SERVICE, "grpc.health.v1.Health"} <= set(names)


async def read_to_the_end(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_server_that_falls_silent_in_the_middle_of_a_stream_is_noticed_long_before_a_minute() -> None:
    async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.1)

    server = rpc.create_server()
    handlers: dict[str, Any] = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Silence", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with FaultProxy("127.0.0.1", port) as proxy, rpc.create_channel(proxy.address) as channel:
        method: Any = channel.unary_stream("/test.Silence/Stream")
        call = method(b"")
        for _ in range(10):
            await anext(aiter(call))
        proxy.link().blackhole()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_to_the_end(call), 60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(None)


@given(text=st.text(st.characters(), min_size=1, max_size=50), times=st.integers(1, 2000))
def test_no_error_is_larger_than_headers_may_be(text: str, times: int) -> None:
    for error in (errors.InvalidRequestError(text * times, text * times), errors.ModelNotFoundError(text * times)):
        status = status_of(error)
        in_base64 = len(status.SerializeToString()) * 4 // 3
        assert in_base64 + 3 * len(status.message.encode()) < 7 * 1024, "clients take 8 KiB"
        assert type(error_of(status)) is type(error)
        assert error.message.encode(errors="replace").decode().startswith(status.message.removesuffix("..."))


async def test_a_long_error_reaches_the_client_as_what_it_is() -> None:
    async def refuse(request: object, context: object) -> object:
        raise errors.ModelNotFoundError("modèle " * 10_000)

    server = rpc.create_server()
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.Y", {"Z": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with rpc.create_channel(f"127.0.0.1:{port}") as channel:
            refused: Any = channel.unary_unary("/x.Y/Z")
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await refused(b"")
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        assert error_of_rpc(failure.value).message.startswith("modèle modèle")
    finally:
        await server.stop(0)
