"""Ends a request, wherever it runs."""

from gateway.requests.known_requests import KnownRequests
from gateway.state.other_gateways import FORWARD_TIMEOUT_S, FORWARDED_METADATA, OtherGateways
from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.errors import UnavailableError
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import inference_pb2


class Cancellation:
    def __init__(self, known: KnownRequests, store: StateStore, gateways: OtherGateways) -> None:
        self._known = known
        self._store = store
        self._gateways = gateways

    async def cancel(self, request_id: str, *, forwarded: bool) -> RequestState:
        """`forwarded`: another gateway asks, because it takes this one for the owner.

        Raises:
            RequestNotFoundError: no such request.
            UnavailableError: the store or the owner does not answer.
        """
        runner = self._known.find_runner(request_id)
        if runner is not None:
            runner.cancel()
            return runner.lifecycle.state
        record = await self._known.get(request_id)
        if is_terminal(record.state):
            return record.state
        address = self._gateways.address_of(record.gateway_id)
        if address is not None and await self._gateways.is_alive(record.gateway_id):
            if not forwarded:
                return await self._forward(address, request_id)
        # The workers of a dead gateway have freed the request already.
        elif await self._store.transition(request_id, record.attempt, RequestState.CANCELLED, owner=record.gateway_id):
            return RequestState.CANCELLED
        raise UnavailableError("the request has just moved to another gateway; try again")

    async def _forward(self, address: str, request_id: str) -> RequestState:
        message = inference_pb2.CancelRequestRequest(request_id=request_id)
        async with self._gateways.calling(address) as stub:
            answer = await stub.CancelRequest(message, timeout=FORWARD_TIMEOUT_S, metadata=(FORWARDED_METADATA,))
        return RequestState(inference_pb2.RequestState.Name(answer.state).removeprefix("REQUEST_STATE_"))
