"""Which other gateways are gone, found out by knocking where they listened, for a lease ends seconds after its holder.

A gateway is met once, when it gets its lease: whoever answers at its address has to say that it is the one. Only of one that was
met there does a refused connection say that its process is gone, or one that is broken off before an answer, by a proxy whose
target does not exist. Addresses that lead elsewhere from here, or nowhere, say nothing, and neither does silence. Whoever is
wrong about it takes a request from a living gateway, which is safe (a new attempt under another owner) but needless.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.backoff import Backoff
from kvrelay.rpc import create_channel
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from kvrelay.worker_registry import Member, MemberRole

ANSWER_TIMEOUT_S = 2.0
MAX_ATTEMPTS_TO_MEET = 6
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
CONNECT_TIMEOUT_S = 0.5
PAUSE_BETWEEN_REFUSALS_S = 0.1
"""One refusal may be a full backlog's; two are nobody's."""

_log = structlog.get_logger(__name__)


class GatewayPeers:
    """The other gateways, as this one has met them.

    Args:
        gateway_id: of this gateway.
    """

    def __init__(self, gateway_id: str) -> None:
        self._gateway_id = gateway_id
        self._meetings: dict[str, asyncio.Task[None]] = {}
        self._addresses: dict[str, str] = {}
        """Of those that were met."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Meets nobody any more at the end."""
        try:
            yield
        finally:
            meetings = list(self._meetings.values())
            for meeting in meetings:
                meeting.cancel()
            await asyncio.gather(*meetings, return_exceptions=True)

    def set_members(self, members: Iterable[Member]) -> None:
        """Those with a lease; new ones are met."""
        others = {member.instance_id: member for member in members if member.role is MemberRole.GATEWAY}
        others.pop(self._gateway_id, None)
        for gone_id in self._meetings.keys() - others.keys():
            self._meetings.pop(gone_id).cancel()
            self._addresses.pop(gone_id, None)
        for gateway_id in others.keys() - self._meetings.keys():
            self._meetings[gateway_id] = asyncio.create_task(self._meet(others[gateway_id]), name=f"meeting {gateway_id}")

    def has_met(self, gateway_id: str) -> bool:
        """Whether that gateway has answered at its address."""
        return gateway_id in self._addresses

    async def is_gone(self, gateway_id: str) -> bool:
        """Whether nobody listens any more where that gateway was met. False, too, when it cannot be told."""
        address = self._addresses.get(gateway_id)
        if address is None or not await is_refused(address):
            return False
        await asyncio.sleep(PAUSE_BETWEEN_REFUSALS_S)
        return await is_refused(address)

    async def _meet(self, member: Member) -> None:
        backoff = Backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        for _ in range(MAX_ATTEMPTS_TO_MEET):
            found_id = await _who_answers(member.address)
            if found_id == member.instance_id:
                self._addresses[member.instance_id] = member.address
                return
            await asyncio.sleep(backoff.next_delay_s())
        _log.info("another gateway is not reached: if it dies, that shows by its lease", gateway_id=member.instance_id)


async def _who_answers(address: str) -> str | None:
    """The id of the gateway at an address."""
    async with create_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            answer = await stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=ANSWER_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
    return str(answer.gateway_id)


async def is_refused(address: str) -> bool:
    """Whether host:port says that no gateway is there. Silence is no such answer."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    return await _breaks_off(address)


async def _breaks_off(address: str) -> bool:
    """Whether a call ends without any answer, neither good nor bad."""
    async with create_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=CONNECT_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            return failure.code() is grpc.StatusCode.UNAVAILABLE
    return False
