"""A tenant that asks every gateway for another's request, and a worker for a session."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import grpc

from gateway.workers.session_messages import hello
from kvrelay.core.member import MemberRole
from kvrelay.errors import (
    AccessDeniedError,
    DeadlineError,
    KvrelayError,
    RequestNotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from kvrelay.security.principal import Role
from kvrelay.v1 import decode_pb2_grpc, inference_pb2, inference_pb2_grpc
from kvrelay.wire.errors import error_of_rpc
from tests.simulation.network import Network, Place, SimulatedChannel
from tests.simulation.security import SPY, certificate_of, metadata_of
from tests.simulation.virtual_time import World

TIMEOUT_S = 2.0
LIVENESS_WINDOW_MS = 600


class Spy:
    """Asks once, when it is started.

    Args:
        world, network: of the cluster.
        request_id: of another tenant's request.
        gateways, workers: addresses of gateways and of decode workers.
    """

    def __init__(
        self, world: World, network: Network, request_id: str, gateways: Sequence[str], workers: Sequence[str]
    ) -> None:
        self.num_refused = 0
        """How often it was told that there is no such request."""
        self.num_refused_by_workers = 0
        self._world = world
        self._network = network
        self._request_id = request_id
        self._gateways = gateways
        self._workers = workers
        self._loop = world.new_loop("spy")
        self._place = Place(self._loop, "spy:1")
        self._prefill_place = Place(self._loop, "spy:2")
        self._prefill_place.certificate = certificate_of(Role.PREFILL)

    def start(self) -> None:
        self._loop.spawn(self._run(), "spy")

    async def _run(self) -> None:
        for address in self._gateways:
            for method, request in (
                ("GetRequest", inference_pb2.GetRequestRequest(request_id=self._request_id)),
                ("Resume", inference_pb2.ResumeRequest(request_id=self._request_id)),
                ("CancelRequest", inference_pb2.CancelRequestRequest(request_id=self._request_id)),
            ):
                await self._ask(address, method, request)
        for address in self._workers:
            await self._ask_worker(address, self._place, UnauthenticatedError)
            await self._ask_worker(address, self._prefill_place, AccessDeniedError)

    async def _ask(self, address: str, method: str, request: Any) -> None:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel(address, self._place))
        answer = await self._answer(getattr(stub, method)(request, timeout=TIMEOUT_S, metadata=metadata_of(SPY)))
        if isinstance(answer, RequestNotFoundError):
            self.num_refused += 1
        elif not isinstance(answer, UnavailableError | DeadlineError):
            self._world.problems.append(f"T: {method} of another tenant's request gave {answer!r}")

    async def _ask_worker(self, address: str, place: Place, expected: type[KvrelayError]) -> None:
        """With a client's key, or with the certificate of another role."""
        stub: Any = decode_pb2_grpc.DecodeServiceStub(self._channel(address, place))
        call = stub.Session(timeout=TIMEOUT_S, metadata=() if place.certificate else metadata_of(SPY))
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(hello(MemberRole.DECODE, "gateway-spy", LIVENESS_WINDOW_MS))
        answer = await self._answer(call)
        if isinstance(answer, expected):
            self.num_refused_by_workers += 1
        elif not isinstance(answer, UnavailableError | DeadlineError):
            self._world.problems.append(f"T: a worker let a stranger in, and gave {answer!r}")

    async def _answer(self, call: Any) -> object:
        """The first message, or the error."""
        try:
            return await call if not hasattr(call, "read") else await call.read()
        except grpc.aio.AioRpcError as failure:
            error: KvrelayError = error_of_rpc(failure)
            return error

    def _channel(self, address: str, place: Place) -> Any:
        return SimulatedChannel(self._network, place, address)
