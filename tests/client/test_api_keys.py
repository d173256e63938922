"""The client sends its key with each call, and never in plain text over a network."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvrelay.client import AsyncClient, Client
from kvrelay.client.api_keys import read_api_key
from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.network import rpc
from kvrelay.security.guard import Guard
from kvrelay.security.method_rules import GRPC_RULES
from kvrelay.security.principal import Principal, Role
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from tests.security.test_guard import Tokens

KEY = "kvr_secret"


class Service(inference_pb2_grpc.InferenceServiceServicer):
    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        return pb.ListModelsResponse()

    async def Generate(self, request: object, context: object) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(accepted=pb.Accepted(request_id="r"))
        yield pb.GenerateResponse(finished=pb.Finished())

    async def Converse(self, requests: AsyncIterator[object], context: object) -> AsyncIterator[pb.ConverseResponse]:
        async for _ in requests:
            yield pb.ConverseResponse(accepted=pb.Accepted(request_id="r"))
            yield pb.ConverseResponse(finished=pb.Finished())


@pytest.fixture
async def address() -> AsyncIterator[str]:
    tokens = Tokens({KEY: Principal(frozenset({Role.CLIENT}), "alice", "alice-1")})
    server = rpc.create_server(guard=Guard(GRPC_RULES[Role.GATEWAY], [tokens], lambda _: frozenset()))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)  # type: ignore[abstract]
    bound = rpc.bind_server(server, "127.0.0.1", 0, [])
    await bound.set_serving(True)
    await server.start()
    yield f"127.0.0.1:{bound.port}"
    await server.stop(None)


async def test_every_kind_of_call_has_the_key(address: str) -> None:
    async with AsyncClient(address, api_key=KEY, timeout_s=60) as client:
        assert await client.list_models() == []
        await client.complete("x")
        async with client.converse() as conversation:
            await conversation.send("x").completion()
        assert (await client.health()).serving


@pytest.mark.parametrize("key", [None, "kvr_other"])
async def test_without_the_right_key_only_health_answers(address: str, key: str | None) -> None:
    async with AsyncClient(address, api_key=key, timeout_s=60) as client:
        for call in (client.list_models(), client.complete("x")):
            with pytest.raises(UnauthenticatedError) as refused:
                await call
            assert "kvr_" not in refused.value.message
        assert (await client.health()).serving


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost", "unix:/tmp/x", "http://127.0.0.9:1"])
def test_a_key_goes_to_this_machine_in_plain_text(address: str) -> None:
    Client(address, api_key=KEY).close()


@pytest.mark.parametrize(
    "address",
    ["10.0.0.5:1", "gateway:50050", "localhost.example:1", "127.0.0.1:1,10.0.0.5:1", "dns:///localhost:1", "0.0.0.0:1"],
)
@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_a_key_goes_nowhere_else_in_plain_text(address: str, make: type[Client | AsyncClient]) -> None:
    with pytest.raises(ConfigError, match="plain text") as refused:
        make(address, api_key=KEY)
    assert KEY not in refused.value.message


def test_a_proxy_gets_no_key_in_plain_text() -> None:
    with pytest.raises(ConfigError, match="proxy"):
        Client("127.0.0.1:1", api_key=KEY, use_proxy=True)


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "ä", "k" * 10_000])
def test_a_text_that_cannot_be_a_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Client("127.0.0.1:1", api_key=key)
    assert not key or key not in refused.value.message


def test_a_key_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert read_api_key(str(path)) == KEY
    for content in (b" \n", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file"):
            read_api_key(str(path))
    with pytest.raises(ConfigError, match="api_key_file"):
        read_api_key(str(tmp_path / "none"))
