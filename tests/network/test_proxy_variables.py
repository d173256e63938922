"""Processes of a cluster and clients reach each other directly, whatever HTTP proxy the environment
names.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2

from kvrelay.client import AsyncClient, Client
from kvrelay.errors import KvrelayError
from kvrelay.network import rpc
from kvrelay.openai_frontend import smg
from tests.project.test_deploy import SERVICES

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


class DeadEndProxy:
    """A proxy that leads nowhere: takes the first line that a connection sends, and closes it."""

    def __init__(self) -> None:
        self.first_lines: list[bytes] = []
        self.url = ""

    async def __aenter__(self) -> "DeadEndProxy":
        self._server = await asyncio.start_server(self._refuse, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.first_lines.append(await reader.readline())
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[DeadEndProxy]:
    async with DeadEndProxy() as proxy:
        yield proxy


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """Of a server that only says that it serves."""
    server = rpc.create_server()
    bound = rpc.bind_server(server, "127.0.0.1", 0, [])
    await bound.set_serving(True)
    await server.start()
    yield f"127.0.0.1:{bound.port}"
    await server.stop(None)


def check(channel: grpc.Channel) -> health_pb2.HealthCheckResponse:
    method = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return method(health_pb2.HealthCheckRequest(), timeout=20)


@pytest.mark.parametrize("variable", [*VARIABLES, *(name.upper() for name in VARIABLES)])
async def test_a_channel_leads_straight_to_its_address(
    variable: str, proxy: DeadEndProxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy.url)
    async with AsyncClient(address, timeout_s=20) as client:
        assert (await client.health()).serving
    with rpc.create_sync_channel(address) as channel:
        answer = await asyncio.to_thread(check, channel)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert proxy.first_lines == []


async def ask_through_proxy(address: str, is_async: bool) -> None:
    if is_async:
        async with AsyncClient(address, timeout_s=5, use_proxy=True) as client:
            await client.cluster()
    else:
        with Client(address, timeout_s=5, use_proxy=True) as blocking_client:
            await asyncio.to_thread(blocking_client.cluster)


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_client_that_is_told_to_goes_through_the_proxy(
    is_async: bool, proxy: DeadEndProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url)
    with pytest.raises(KvrelayError):
        await ask_through_proxy("gateway.example:50050", is_async)
    assert proxy.first_lines[0].startswith(b"CONNECT gateway.example:50050 ")


def test_the_openai_front_inherits_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
        monkeypatch.setenv(variable.upper(), "http://127.0.0.1:9")
    environment = smg.environment()
    assert not [name for name in environment if name.lower() in VARIABLES]
    assert "PATH" in environment


def test_health_checks_of_the_compose_file_go_around_proxies() -> None:
    commands = [service["healthcheck"].get("test", []) for service in SERVICES.values() if "healthcheck" in service]
    over_http = [command for command in commands if "http://" in " ".join(command)]
    assert len(over_http) == 3
    for command in over_http:
        text = " ".join(command)
        assert "ProxyHandler({})" in text or "-Y off" in text, f"goes through a proxy: {text}"
