"""Finds and calls other gateways."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from gateway.state.failure_detector import GatewayFailureDetector
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import AccessDeniedError, UnauthenticatedError, UnavailableError
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import Towards, in_plain_text
from kvrelay.security.principal import Role
from kvrelay.v1 import inference_pb2_grpc
from kvrelay.wire.errors import error_of_rpc

FORWARDED_METADATA = ("kvrelay-forwarded", "1")
"""Marks a forwarded call, which must not be forwarded again."""
FORWARD_TIMEOUT_S = 5.0
REFUSED_MESSAGE = "the gateway that has the request does not know this one; give gateways certificates, or ask it"


class OtherGateways:
    """`failures` knows of deaths before the leases end."""

    def __init__(
        self,
        own_id: str,
        members: Callable[[MemberRole], tuple[Member, ...]],
        failures: GatewayFailureDetector,
        towards: Towards = in_plain_text,
    ) -> None:
        self._towards = towards
        self.own_id = own_id
        self._members = members
        self._failures = failures

    def address_of(self, gateway_id: str) -> str | None:
        """Returns None for this gateway, or without a lease."""
        return self.addresses().get(gateway_id)

    def addresses(self) -> dict[str, str]:
        gateways = self._members(MemberRole.GATEWAY)
        return {gateway.instance_id: gateway.address for gateway in gateways if gateway.instance_id != self.own_id}

    async def is_alive(self, gateway_id: str) -> bool:
        """Returns False for this gateway: it runs what it owns."""
        return self.address_of(gateway_id) is not None and not await self._failures.is_down(gateway_id)

    @asynccontextmanager
    async def calling(self, address: str) -> AsyncIterator["inference_pb2_grpc.InferenceServiceAsyncStub"]:
        """Raises failed calls as KvrelayError.

        The receiver compares no tenants for a gateway: this one must have done so.
        """
        async with create_channel(address, credentials=self._towards(Role.GATEWAY)) as channel:
            try:
                yield inference_pb2_grpc.InferenceServiceStub(channel)
            except grpc.aio.AioRpcError as failure:
                error = error_of_rpc(failure)
                if isinstance(error, UnauthenticatedError | AccessDeniedError):
                    raise UnavailableError(REFUSED_MESSAGE) from failure
                raise error from failure
