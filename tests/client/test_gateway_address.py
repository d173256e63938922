"""What people give a client as a gateway's address, and what they are told where no gateway answers
there.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.client.addresses import Addresses
from kvrelay.client.connection_errors import is_answer_of_http, unreachable_error
from kvrelay.errors import ConfigError, UnavailableError
from kvrelay.network.http_server import Health, serving_http


@pytest.mark.parametrize(
    ("given", "dialled"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("gateway", "gateway:50050"),
        ("http://127.0.0.1:50050", "127.0.0.1:50050"),
        ("grpc://gateway:1/", "gateway:1"),
        ("HTTP://gateway", "gateway:50050"),
        ("127.0.0.1:50050/", "127.0.0.1:50050"),
        ("::1", "[::1]:50050"),
        ("[::1]", "[::1]:50050"),
        ("http://[::1]:7", "[::1]:7"),
        ("unix:///run/gateway.sock", "unix:///run/gateway.sock"),
        ("dns:///gateway:1", "dns:///gateway:1"),
    ],
)
def test_an_address_is_dialled_as_it_is_meant(given: str, dialled: str) -> None:
    assert Addresses(given).all == (dialled,)


def test_several_addresses_are_each_read_so() -> None:
    assert Addresses(" http://a:1, b ,,[::1]:2/").all == ("a:1", "b:50050", "[::1]:2")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("https://gateway", "does not say how to encrypt"),
        ("grpcs://gateway:1", "does not say how to encrypt"),
        ("ftp://gateway", "write host:port"),
        ("127.0.0.1:50080/v1", "path"),
        ("::1:50050", r"\[::1\]:50050"),
        ("127.0.0.1:99999", "1 to 65535"),
        (":50050", "no host"),
        ("", "needs the address"),
        (" , ", "needs the address"),
    ],
)
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_what_is_no_address_is_refused_before_anything_is_dialled(
    client: Callable[[str], object], given: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        client(given)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "given", ["http://me:secret@gateway:1", "https://me:secret@gateway", "ftp://:secret@a", "me:secret@a:1"]
)
def test_a_password_in_an_address_is_not_repeated(given: str) -> None:
    with pytest.raises(ConfigError, match="user name or password") as error:
        Client(given)
    assert "secret" not in str(error.value)


async def test_the_port_for_http_is_said_to_be_none_of_grpc() -> None:
    async with serving_http("127.0.0.1", 0, lambda: Health.SERVING) as port, AsyncClient(f"127.0.0.1:{port}") as client:
        calls: list[Callable[[], Awaitable[object]]] = [client.cluster, client.health, lambda: client.complete("x")]
        for call in calls:
            with pytest.raises(
                UnavailableError, match=r"speaks HTTP and not gRPC; a gateway's gRPC port is usually 50050"
            ):
                await call()


async def test_a_server_of_another_protocol_is_said_to_be_one() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"-ERR unknown command 'PRI'\r\n" + b"x" * 100)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, AsyncClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        with pytest.raises(UnavailableError, match="another protocol than gRPC"):
            await client.cluster()


def test_an_answer_of_http2_is_told_from_a_proxy_whose_gateway_is_away() -> None:
    web, proxy = "Received http2 header with status: 404", "Received http2 header with status: 503"
    assert (is_answer_of_http(web), is_answer_of_http(proxy), is_answer_of_http("Method not found!")) == (
        True,
        False,
        False,
    )
    assert "speaks HTTP and not gRPC (it answered with status 404)" in unreachable_error(web, ["a:1"]).message


def test_the_last_cause_of_a_chain_is_what_is_said() -> None:
    chain = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
    assert (
        unreachable_error(chain, ["a:1", "b:2"]).message == "cannot reach a gateway at a:1 or b:2: Connection refused"
    )
