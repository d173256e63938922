"""Where processes listen: the same addresses with gRPC and HTTP, in IPv4 and IPv6, and true
sentences where they cannot.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from kvrelay.client import AsyncClient
from kvrelay.config.settings import ClientSettings, GatewaySettings, ServerSettings
from kvrelay.config.sources import read_sources
from kvrelay.errors import ConfigError, StartupError
from kvrelay.network import rpc
from kvrelay.network.http_server import Health, serving_http
from kvrelay.network.listening import bind_sockets, check_port
from tests.support.ipv6 import HAS_IPV6, needs_ipv6

BOTH = ["127.0.0.1", "[::1]"] if HAS_IPV6 else ["127.0.0.1"]


@asynccontextmanager
async def serving(host: str) -> AsyncIterator[tuple[int, int]]:
    """Ports of gRPC and of HTTP, both on the host as the command line takes it."""
    chosen = read_sources({"host": host}, environment={}).load("gateway", GatewaySettings).server.host
    server = rpc.create_server()
    bound = rpc.bind_server(server, chosen, 0, [])
    await bound.set_serving(True)
    await server.start()
    try:
        async with serving_http(chosen, 0, lambda: Health.SERVING) as http_port:
            assert http_port is not None
            yield bound.port, http_port
    finally:
        await server.stop(None)


async def answers(place: str, grpc_port: int, http_port: int) -> tuple[bool, int]:
    async with AsyncClient(f"{place}:{grpc_port}", timeout_s=20) as client:
        health = await client.health()
    async with aiohttp.ClientSession() as session, session.get(f"http://{place}:{http_port}/healthz") as response:
        return health.serving, response.status


@pytest.mark.parametrize(
    ("host", "places"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        pytest.param("::1", ["[::1]"], marks=needs_ipv6),
        pytest.param("[::1]", ["[::1]"], marks=needs_ipv6),
        ("0.0.0.0", BOTH),
        ("::", BOTH),
        ("[::]", BOTH),
        ("localhost", ["localhost"]),
    ],
)
async def test_grpc_and_http_answer_on_the_same_addresses(host: str, places: list[str]) -> None:
    async with serving(host) as (grpc_port, http_port):
        for place in places:
            assert await answers(place, grpc_port, http_port) == (True, 200)


def resolve_to_both_families(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = socket.getaddrinfo

    def resolve(host: object, port: object, *rest: object, **options: object) -> object:
        if host != name:
            return real(host, port, *rest, **options)  # type: ignore[arg-type]
        return [*real("127.0.0.1", port, *rest, **options), *real("::1", port, *rest, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@needs_ipv6
def test_a_name_with_addresses_of_both_families_gets_one_port_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to_both_families(monkeypatch, "both.example")
    sockets = bind_sockets("both.example", 0, "--port")
    names = [each.getsockname() for each in sockets]
    for each in sockets:
        each.close()
    assert [name[0] for name in names] == ["127.0.0.1", "::1"]
    assert names[0][1] == names[1][1]


@needs_ipv6
def test_a_port_that_is_taken_on_one_of_a_names_addresses_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to_both_families(monkeypatch, "both.example")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartupError, match=rf"cannot listen on both\.example:{port}: the port is taken.*--port \(0 takes"
        ):
            check_port("both.example", port, "--port")


def test_checking_a_port_takes_no_connection() -> None:
    port = check_port("127.0.0.1", 0, "--port")
    (bound,) = bind_sockets("127.0.0.1", port, "--port")
    with bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
async def test_a_taken_port_is_said_to_be_taken(host: str) -> None:
    (taken,) = bind_sockets(host, 0, "--port")
    with taken:
        taken.listen()
        with pytest.raises(StartupError, match=r"the port is taken\. Free it, or choose another with --port"):
            rpc.bind_server(rpc.create_server(), host, taken.getsockname()[1], [])


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("192.0.2.1", r"cannot listen on 192\.0\.2\.1:0: this machine does not have the address"),
        pytest.param(
            "2001:db8::1",
            r"cannot listen on \[2001:db8::1\]:0: this machine does not have the address",
            marks=needs_ipv6,
        ),
        ("nowhere.invalid", "'nowhere.invalid' is neither an address nor a name that is known here"),
    ],
)
async def test_a_host_that_is_not_this_machines_is_not_said_to_be_taken(host: str, problem: str) -> None:
    with pytest.raises(StartupError, match=problem):
        rpc.bind_server(rpc.create_server(), host, 0, [])
    with pytest.raises(StartupError, match=problem.replace(":0:", ":0 for HTTP:")):
        async with serving_http(host, 0, lambda: Health.SERVING):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1:50050", "[::1]:50050", "::1:50050:x", "[::1", "a b", "10.0.0.0/8"])
def test_a_host_that_is_none_stops_the_start_and_says_so(host: str) -> None:
    with pytest.raises(ConfigError, match=r"host is .* \(flag --host\): "):
        read_sources({"host": host}, environment={}).load("gateway", GatewaySettings)


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"host": "::1"}, "[::1]:50051"),
        ({"host": "[fd00::7]"}, "[fd00::7]:50051"),
        ({"advertise_address": "[fd00::7]:1"}, "[fd00::7]:1"),
        ({"advertise_address": "fd00::7"}, "[fd00::7]:50051"),
        ({"advertise_address": "10.0.0.7"}, "10.0.0.7:50051"),
    ],
)
def test_addresses_that_others_dial_have_brackets_and_a_port(settings: dict[str, str], address: str) -> None:
    server: ServerSettings = read_sources(settings, environment={}).load("gateway", GatewaySettings).server
    assert server.address_of(50051) == address


@pytest.mark.parametrize("address", ["10.0.0.7:", "10.0.0.7:http", "::1:50050x", "10.0.0.7:70000"])
def test_an_advertised_address_that_nobody_could_dial_stops_the_start(address: str) -> None:
    with pytest.raises(ConfigError, match=r"advertise_address is .* \(flag --advertise-address\)"):
        read_sources({"advertise_address": address}, environment={}).load("gateway", GatewaySettings)


@needs_ipv6
async def test_a_client_takes_an_ipv6_address_from_its_settings() -> None:
    async with serving("::1") as (grpc_port, _):
        settings = read_sources({"gateway": f"[::1]:{grpc_port}"}, environment={}).load("client", ClientSettings)
        async with AsyncClient(settings.gateway, timeout_s=20) as client:
            assert (await asyncio.wait_for(client.health(), 20)).serving
