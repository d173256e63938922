"""Detects dead gateways through real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.state import failure_detector
from gateway.state.failure_detector import GatewayFailureDetector, is_refused
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.rpc import create_server
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import inference_pb2, inference_pb2_grpc


class SmallGateway(inference_pb2_grpc.InferenceServiceServicer):
    """Says who it is."""

    def __init__(self, gateway_id: str) -> None:
        self.server = create_server()
        self.num_calls = 0
        self._gateway_id = gateway_id
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def GetCluster(self, request: object, context: Any) -> inference_pb2.GetClusterResponse:
        self.num_calls += 1
        return inference_pb2.GetClusterResponse(gateway_id=self._gateway_id)


@asynccontextmanager
async def running(gateway_id: str) -> AsyncIterator[SmallGateway]:
    gateway = SmallGateway(gateway_id)  # type: ignore[abstract]  # one call is enough
    await gateway.server.start()
    try:
        yield gateway
    finally:
        await gateway.server.stop(0)


def member(gateway_id: str, address: str) -> Member:
    return Member(gateway_id, MemberRole.GATEWAY, address)


async def test_a_gateway_that_was_verified_is_down_once_its_address_refuses_connections() -> None:
    known = GatewayFailureDetector("g1")
    async with known.running():
        async with running("g2") as other:
            known.set_members([member("g1", "127.0.0.1:1"), member("g2", other.address)])
            await wait_until(lambda: "g2" in known._addresses, "its identity is verified", 30)
            assert not await known.is_down("g2")
        assert await known.is_down("g2")
        known.set_members([])
        assert not await known.is_down("g2"), "of one without a lease nothing is known here"


async def test_an_address_of_another_gateway_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_detector, "FIRST_WAIT_S", 0.001)
    known = GatewayFailureDetector("g1")
    async with known.running(), running("somebody else") as other:
        known.set_members([member("g2", other.address), member("g3", "127.0.0.1:1")])
        await wait_until(lambda: other.num_calls >= 2, "it was asked again", 30)
        assert not await known.is_down("g2")
        assert not await known.is_down("g3")


async def test_a_silent_address_proves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:  # like a stopped process
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert not await is_refused(address)
    assert await is_refused(address)


async def test_a_proxy_without_a_backend_counts_as_a_refusal() -> None:
    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(break_off, "127.0.0.1", 0) as server:
        assert await is_refused(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")


@pytest.mark.parametrize("address", ["", ":", "nowhere", "127.0.0.1:http:", "host.invalid:1"])
async def test_an_invalid_address_proves_nothing(address: str) -> None:
    assert not await asyncio.wait_for(is_refused(address), 30)
