"""The relay between smg and a gateway: what it adds, what it refuses, and that streams, errors and
cancellations pass it unchanged.
"""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import structlog.testing

from kvrelay.errors import AccessDeniedError, ConfigError, InvalidRequestError, QuotaError, UnavailableError
from kvrelay.network.rpc import create_server
from kvrelay.openai_frontend import relay as relay_module
from kvrelay.openai_frontend.gateway_channel import GatewayChannel
from kvrelay.openai_frontend.open_requests import FRONT_ITSELF, Client, OpenRequests
from kvrelay.openai_frontend.relay import Relay
from kvrelay.security.credentials import ChannelCredentials, in_plain_text
from kvrelay.security.method_rules import GRPC_RULES
from kvrelay.security.principal import Role
from kvrelay.testing.waiting import wait_until
from kvrelay.vllm_engine.messages import engine_grpc, engine_pb
from kvrelay.wire.errors import error_of_rpc
from tests.support import left_out

TIMEOUT_S = 60.0
OTHER_USER = 65534
ALICE = Client("alice", "alices-key")
TENANT, AUTHORIZATION = "kvrelay-tenant-bin", "authorization"
MANY = 2000
BLOCKED_S = 1.0


@dataclass
class FakeGateway:
    """Notes each call; `answer` is its Generate."""

    calls: list[tuple[str, dict[str, str | bytes]]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    answer: Callable[[Any], Awaitable[None]] | None = None
    refusal: grpc.StatusCode | None = None
    address: str = ""

    async def unary(self, method: str, context: Any) -> None:
        self.calls.append((method, dict(context.invocation_metadata())))
        self.timeouts.append(context.time_remaining())
        if self.refusal is not None:
            await context.abort(self.refusal, "refused")

    async def Generate(self, request: Any, context: Any) -> None:
        await self.unary("Generate", context)
        if self.answer is None:
            await context.write(engine_pb.GenerateResponse(complete=engine_pb.GenerateComplete(cached_tokens=7)))
        else:
            await self.answer(context)

    async def Abort(self, request: Any, context: Any) -> Any:
        await self.unary("Abort", context)
        self.aborted += request.request_ids
        return engine_pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: Any) -> Any:
        await self.unary("HealthCheck", context)
        return engine_pb.HealthCheckResponse(healthy=True, message="fine")


class Service(engine_grpc.VllmEngineServicer):  # type: ignore[misc]  # its base is not typed
    def __init__(self, gateway: FakeGateway) -> None:
        self.Generate = gateway.Generate
        self.Abort = gateway.Abort
        self.HealthCheck = gateway.HealthCheck


@dataclass
class Both:
    gateway: FakeGateway
    requests: OpenRequests
    relay: Relay
    smg: Any
    """A stub of the relay, as smg has."""

    async def generate(self, request_id: str) -> list[Any]:
        return [message async for message in self.smg.Generate(engine_pb.GenerateRequest(request_id=request_id))]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack, asyncio.timeout(TIMEOUT_S):
        yield stack


async def start_gateway(stack: AsyncExitStack) -> FakeGateway:
    gateway, server = FakeGateway(), create_server()
    engine_grpc.add_VllmEngineServicer_to_server(Service(gateway), server)
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    stack.push_async_callback(server.stop, None)
    return gateway


async def start_relay(stack: AsyncExitStack, gateway: FakeGateway, **channel: Any) -> Both:
    arguments = {"towards": in_plain_text, "key": None} | channel
    requests = OpenRequests()
    relay = Relay(GatewayChannel(gateway.address, **arguments), requests)
    await relay.start()
    stack.push_async_callback(relay.stop)
    smg = await stack.enter_async_context(grpc.aio.insecure_channel(relay.address))
    return Both(gateway, requests, relay, engine_grpc.VllmEngineStub(smg))


@pytest.fixture
async def both(stack: AsyncExitStack) -> Both:
    return await start_relay(stack, await start_gateway(stack))


def with_cluster_key(role: Role) -> ChannelCredentials:
    assert role is Role.GATEWAY
    return ChannelCredentials(None, None, b"", lambda address: f"the-fronts-proof-for-{address}")


async def test_a_clients_request_goes_with_its_key_and_tenant_and_the_rest_as_the_front(stack: AsyncExitStack) -> None:
    both = await start_relay(stack, await start_gateway(stack), towards=with_cluster_key)
    with both.requests.of(ALICE, "chat/completions") as request_id:
        answers = await both.generate(f"{request_id}-0198f")
    assert [answer.complete.cached_tokens for answer in answers] == [7]
    assert (await both.smg.HealthCheck(engine_pb.HealthCheckRequest())).message == "fine"
    with both.requests.of(FRONT_ITSELF, "completions") as request_id:
        await both.generate(f"{request_id}-p0-0198f")
    said = [(name, given.get(AUTHORIZATION), given.get(TENANT)) for name, given in both.gateway.calls]
    proof = f"Bearer the-fronts-proof-for-{both.gateway.address}"
    assert said == [
        ("Generate", "Bearer alices-key", b"alice"),
        ("HealthCheck", proof, None),
        ("Generate", proof, None),
    ]
    assert all(timeout is not None and timeout < 2 * 3600 for timeout in both.gateway.timeouts)


async def test_smgs_trace_goes_on_and_no_other_metadata(both: Both) -> None:
    traceparent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    with both.requests.of(ALICE, "responses") as request_id:
        request = engine_pb.GenerateRequest(request_id=f"{request_id}-1")
        metadata = (("traceparent", traceparent), (AUTHORIZATION, "Bearer forged"), (TENANT, b"bob"))
        _ = [message async for message in both.smg.Generate(request, metadata=metadata)]
    ((_, given),) = both.gateway.calls
    assert given["traceparent"] == traceparent
    assert (given[AUTHORIZATION], given[TENANT]) == ("Bearer alices-key", b"alice")


@pytest.mark.parametrize("wrong", ["", "x", "chatcmpl-" + "0" * 32, "{token}-1", "{id}x-1", "req-{token}-1"])
async def test_an_id_that_the_front_did_not_make_reaches_no_gateway(both: Both, wrong: str) -> None:
    with both.requests.of(ALICE, "chat/completions") as request_id:
        token = request_id.removeprefix("chatcmpl-")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await both.generate(wrong.format(id=request_id, token=token))
    assert isinstance(error_of_rpc(refused.value), AccessDeniedError)
    assert both.gateway.calls == []


async def test_an_id_ends_with_its_http_request(both: Both) -> None:
    with both.requests.of(ALICE, "chat/completions") as request_id:
        await both.generate(f"{request_id}-1")
    with pytest.raises(grpc.aio.AioRpcError):
        await both.generate(f"{request_id}-2")
    assert len(both.gateway.calls) == 1


async def test_what_smg_aborts_is_aborted_as_its_client_and_only_what_runs(both: Both) -> None:
    running, hold = asyncio.Event(), asyncio.Event()

    async def answer(context: Any) -> None:
        running.set()
        await hold.wait()

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        asked = asyncio.create_task(both.generate(f"{request_id}-1"))
        await running.wait()
        await both.smg.Abort(engine_pb.AbortRequest(request_ids=[f"{request_id}-1", f"{request_id}-2", "x"]))
        assert both.gateway.aborted == [f"{request_id}-1"]
        assert both.gateway.calls[-1][1][AUTHORIZATION] == "Bearer alices-key"
        hold.set()
        await asked
    await both.smg.Abort(engine_pb.AbortRequest(request_ids=[f"{request_id}-1"]))
    assert both.gateway.aborted == [f"{request_id}-1"]


async def test_a_refusal_arrives_with_all_its_details(both: Both) -> None:
    async def answer(context: Any) -> None:
        raise QuotaError("key 'alice-1' has enough", 4200, "running_requests")

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id, pytest.raises(grpc.aio.AioRpcError) as refused:
        await both.generate(f"{request_id}-1")
    error = error_of_rpc(refused.value)
    assert isinstance(error, QuotaError)
    assert (error.retry_after_ms, "alice-1" in error.message) == (4200, True)


async def test_messages_come_before_the_error_that_ends_them(both: Both) -> None:
    async def answer(context: Any) -> None:
        await context.write(engine_pb.GenerateResponse())
        await context.abort(grpc.StatusCode.CANCELLED, "over")

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        call = both.smg.Generate(engine_pb.GenerateRequest(request_id=f"{request_id}-1"))
        assert await call.read() == engine_pb.GenerateResponse()
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_gateway_that_is_gone_is_told_without_its_address(both: Both, stack: AsyncExitStack) -> None:
    gone = await start_relay(stack, FakeGateway(address="127.0.0.1:9"))  # the discard port
    with gone.requests.of(ALICE, "chat/completions") as request_id, pytest.raises(grpc.aio.AioRpcError) as failure:
        await gone.generate(f"{request_id}-1")
    error = error_of_rpc(failure.value)
    assert isinstance(error, UnavailableError)
    assert error.retry_after_ms is not None
    assert "127.0.0.1" not in error.message


async def test_smg_that_hangs_up_ends_the_call_of_the_gateway(both: Both) -> None:
    ended = asyncio.Event()

    async def answer(context: Any) -> None:
        try:
            await context.write(engine_pb.GenerateResponse())
            await asyncio.Event().wait()
        finally:
            ended.set()

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        call = both.smg.Generate(engine_pb.GenerateRequest(request_id=f"{request_id}-1"))
        await call.read()
        call.cancel()
        await ended.wait()


async def test_an_http_request_that_ends_ends_the_call_of_the_gateway(both: Both) -> None:
    running, ended = asyncio.Event(), asyncio.Event()

    async def answer(context: Any) -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        asked = asyncio.create_task(both.generate(f"{request_id}-1"))
        await running.wait()
    await ended.wait()
    with pytest.raises(grpc.aio.AioRpcError) as cancelled:
        await asked
    assert cancelled.value.code() is grpc.StatusCode.CANCELLED


async def test_a_client_that_does_not_read_stops_the_gateway(both: Both) -> None:
    num_written, stopped = 0, asyncio.Event()

    async def answer(context: Any) -> None:
        nonlocal num_written
        message = engine_pb.GenerateResponse(chunk=engine_pb.GenerateStreamChunk(token_ids=range(1, 20_000)))
        while num_written < MANY:  # some 100 MiB
            try:
                await asyncio.wait_for(context.write(message), BLOCKED_S)
            except TimeoutError:
                break
            num_written += 1
        stopped.set()

    both.gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        call = both.smg.Generate(engine_pb.GenerateRequest(request_id=f"{request_id}-1"))
        await call.read()
        await stopped.wait()
        call.cancel()
    assert num_written < MANY // 2


async def test_only_methods_of_the_table_are_passed_on(both: Both) -> None:
    names = {method.name for method in engine_pb.DESCRIPTOR.services_by_name["VllmEngine"].methods}
    passed = {method.rpartition("/")[2] for method in GRPC_RULES[Role.FRONT]}
    assert passed < names
    for name in sorted(names - passed):
        channel_method = getattr(both.smg, name)
        call = channel_method(_request_of(name))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await (call.read() if hasattr(call, "read") else call)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert both.gateway.calls == []


def _request_of(name: str) -> Any:
    method = engine_pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name[name]
    return method.input_type._concrete_class()


async def test_bytes_that_are_no_message_are_refused(both: Both) -> None:
    async with grpc.aio.insecure_channel(both.relay.address) as channel:
        for name in ("Generate", "Embed", "Abort"):
            call: Any = channel.unary_stream(f"/vllm.grpc.engine.VllmEngine/{name}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(b"\xff").read()
            assert isinstance(error_of_rpc(refused.value), InvalidRequestError)


async def test_a_gateway_that_does_not_know_the_front_is_told_to_the_operator_once(both: Both) -> None:
    both.gateway.refusal = grpc.StatusCode.UNAUTHENTICATED
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await both.smg.HealthCheck(engine_pb.HealthCheckRequest())
        with both.requests.of(ALICE, "chat/completions") as request_id, pytest.raises(grpc.aio.AioRpcError):
            await both.generate(f"{request_id}-1")
    assert [(log["log_level"], "--gateway-key-file" in log["event"]) for log in logs] == [("error", True)]


async def test_the_port_answers_no_other_user(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await both.smg.HealthCheck(engine_pb.HealthCheckRequest())
    assert isinstance(error_of_rpc(refused.value), AccessDeniedError)
    assert both.gateway.calls == []


# Loads its modules as root, because the other user may not read this installation.
_ROGUE = textwrap.dedent("""
    import os, sys
    import grpc

    target, user = sys.argv[1], int(sys.argv[2])
    grpc.insecure_channel(target).close()
    os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
    with grpc.insecure_channel(target) as channel:
        for name in ("HealthCheck", "GetModelInfo", "GetServerInfo", "GetLoads", "GetTokenizer", "Generate"):
            try:
                list(channel.unary_stream(f"/vllm.grpc.engine.VllmEngine/{name}")(b"", timeout=60))
                print(name, "worked")
            except grpc.RpcError as failure:
                print(name, failure.code().name)
""")


@pytest.mark.skipif(os.geteuid() != 0, reason=left_out.not_for("users who cannot become another"))
async def test_another_user_of_the_machine_gets_nothing_from_it(both: Both) -> None:
    rogue = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _ROGUE, both.relay.address, str(OTHER_USER)],
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [line.split()[1] for line in rogue.stdout.splitlines()]
    assert answers == ["PERMISSION_DENIED"] * 6
    assert both.gateway.calls == []


async def test_keys_cross_no_network_in_plain_text() -> None:
    elsewhere = GatewayChannel("192.0.2.1:50050", in_plain_text, None)
    assert elsewhere.metadata_of(ALICE) == ((TENANT, b"alice"),)
    await elsewhere.close()
    with pytest.raises(ConfigError, match="plain text"):
        GatewayChannel("192.0.2.1:50050", in_plain_text, "the-fronts-own-key")


async def test_calls_that_begin_after_a_change_of_certificates_use_the_new_ones(stack: AsyncExitStack) -> None:
    gateway = await start_gateway(stack)
    digest = b"1"
    both = await start_relay(stack, gateway, towards=lambda role: ChannelCredentials(None, None, digest))
    peers, hold = list[str](), asyncio.Event()

    async def answer(context: Any) -> None:
        peers.append(context.peer())
        if len(peers) == 1:
            await hold.wait()

    gateway.answer = answer
    with both.requests.of(ALICE, "chat/completions") as request_id:
        first = asyncio.create_task(both.generate(f"{request_id}-1"))
        await wait_until(lambda: len(peers) == 1, "the first call has begun")
        digest = b"2"
        await both.generate(f"{request_id}-2")
        await both.generate(f"{request_id}-3")
        hold.set()
        await first
    assert peers[0] != peers[1] == peers[2]


def test_the_timeouts_are_bounded() -> None:
    assert max(relay_module.CALL_TIMEOUT_S, relay_module.TOKENIZER_TIMEOUT_S) < relay_module.GENERATE_TIMEOUT_S
