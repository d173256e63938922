"""Detects dead gateways by connecting to their address, before their lease ends.

A connection that is refused, or that a proxy breaks off, proves only a verified gateway's death.
Silence proves nothing. A false positive is safe: it costs an attempt.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.core.backoff import Backoff
from kvrelay.core.member import Member, MemberRole
from kvrelay.network.host_port import split_host_port
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import ChannelCredentials, Towards, in_plain_text
from kvrelay.security.principal import Role
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

ANSWER_TIMEOUT_S = 2.0
MAX_VERIFICATIONS = 6
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
CONNECT_TIMEOUT_S = 0.5
PAUSE_BETWEEN_PROBES_S = 0.1
"""A full backlog refuses once, a dead process twice."""

_log = structlog.get_logger(__name__)


class GatewayFailureDetector:
    def __init__(self, gateway_id: str, towards: Towards = in_plain_text) -> None:
        self._towards = towards
        self._gateway_id = gateway_id
        self._verifications: dict[str, asyncio.Task[None]] = {}
        self._addresses: dict[str, str] = {}
        """Of verified gateways."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            verifications = list(self._verifications.values())
            for verification in verifications:
                verification.cancel()
            await asyncio.gather(*verifications, return_exceptions=True)

    def set_members(self, members: Iterable[Member]) -> None:
        others = {member.instance_id: member for member in members if member.role is MemberRole.GATEWAY}
        others.pop(self._gateway_id, None)
        for gone_id in self._verifications.keys() - others.keys():
            self._verifications.pop(gone_id).cancel()
            self._addresses.pop(gone_id, None)
        for gateway_id in others.keys() - self._verifications.keys():
            verification = asyncio.create_task(
                self._verify_identity(others[gateway_id]), name=f"verification of {gateway_id}"
            )
            self._verifications[gateway_id] = verification

    async def is_down(self, gateway_id: str) -> bool:
        """Whether a verified gateway's address refuses two probes."""
        address = self._addresses.get(gateway_id)
        if address is None or not await is_refused(address, self._towards(Role.GATEWAY)):
            return False
        await asyncio.sleep(PAUSE_BETWEEN_PROBES_S)
        return await is_refused(address, self._towards(Role.GATEWAY))

    async def _verify_identity(self, member: Member) -> None:
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S, random.random)
        for _ in range(MAX_VERIFICATIONS):
            if await _gateway_id_at(member.address, self._towards(Role.GATEWAY)) == member.instance_id:
                self._addresses[member.instance_id] = member.address
                return
            await asyncio.sleep(backoff.next_delay_s())
        _log.info("another gateway is not reached: if it dies, that shows by its lease", gateway_id=member.instance_id)


async def _gateway_id_at(address: str, credentials: ChannelCredentials | None) -> str | None:
    async with create_channel(address, credentials=credentials) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            answer = await stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
    return str(answer.gateway_id)


async def is_refused(address: str, credentials: ChannelCredentials | None = None) -> bool:
    """Whether a probe proves that no gateway listens at host:port."""
    try:
        host, port = split_host_port(address)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return await _breaks_off(address, credentials)


async def _breaks_off(address: str, credentials: ChannelCredentials | None) -> bool:
    """Whether a call ends without an answer."""
    async with create_channel(address, credentials=credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=CONNECT_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            return failure.code() is grpc.StatusCode.UNAVAILABLE
    return False
