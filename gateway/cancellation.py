"""Ends a request, wherever it runs."""

import grpc

from gateway.relay import Relay
from kvrelay.error_status import error_of_rpc
from kvrelay.errors import RequestNotFoundError, UnavailableError
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState, is_terminal
from kvrelay.rpc import create_channel
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from kvrelay.worker_registry import MemberRole

FORWARDED_METADATA = ("kvrelay-forwarded", "1")
"""Marks a call that one gateway made for another, which must not make it again."""
FORWARD_TIMEOUT_S = 5.0


async def cancel_request(relay: Relay, request_id: str, *, forwarded: bool) -> RequestState:
    """Ends a request and returns its state.

    Args:
        relay: this gateway.
        request_id: the request.
        forwarded: another gateway asks, because it takes this one for the owner.

    Raises:
        RequestNotFoundError: no such request.
        UnavailableError: the store, or the gateway that owns the request, does not answer.
    """
    runner = relay.requests.find(request_id)
    if runner is not None:
        runner.cancel()
        return runner.lifecycle.state
    record = await relay.store.get(request_id)
    if record is None:
        raise RequestNotFoundError(f"request {request_id!r} is not known, or was forgotten; check the id")
    if is_terminal(record.state):
        return record.state
    owners = [member for member in relay.members(MemberRole.GATEWAY) if member.instance_id == record.gateway_id]
    if not owners or record.gateway_id == relay.gateway_id or await relay.peers.is_gone(record.gateway_id):
        return await _cancel_orphan(relay, record)
    if forwarded:
        raise UnavailableError("the request has just moved to another gateway; try again")
    return await _forward(owners[0].address, request_id)


async def _cancel_orphan(relay: Relay, record: RequestRecord) -> RequestState:
    """Its gateway is dead, and its workers have freed it already."""
    if await relay.store.transition(record.request_id, record.attempt, RequestState.CANCELLED, owner=record.gateway_id):
        return RequestState.CANCELLED
    raise UnavailableError("the request has just moved to another gateway; try again")


async def _forward(address: str, request_id: str) -> RequestState:
    async with create_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        message = inference_pb2.CancelRequestRequest(request_id=request_id)
        try:
            answer = await stub.CancelRequest(message, timeout=FORWARD_TIMEOUT_S, metadata=(FORWARDED_METADATA,))
        except grpc.aio.AioRpcError as failure:
            raise error_of_rpc(failure) from failure
    return RequestState(inference_pb2.RequestState.Name(answer.state).removeprefix("REQUEST_STATE_"))
