"""What a gateway tells of one request's life: its own memory, or that of the gateway which ran it. Reads only."""

import asyncio

import grpc

from gateway.cancellation import FORWARD_TIMEOUT_S, FORWARDED_METADATA
from gateway.cluster_view import request_info
from gateway.relay import Relay
from gateway.timeline_spans import timeline_of
from kvrelay.error_status import error_of_rpc
from kvrelay.errors import RequestNotFoundError
from kvrelay.request_record import RequestSummary
from kvrelay.rpc import create_channel
from kvrelay.timeline_messages import timeline_to_pb
from kvrelay.v1 import inference_pb2, inference_pb2_grpc
from kvrelay.worker_registry import MemberRole


async def get_timeline(relay: Relay, request_id: str, *, forwarded: bool) -> inference_pb2.GetTimelineResponse:
    """A request's timeline.

    Args:
        relay: this gateway.
        request_id: the request.
        forwarded: another gateway asks, because it takes this one for the owner.

    Raises:
        RequestNotFoundError: no such request, or its timeline is kept nowhere any more.
        UnavailableError: the gateway that ran it does not answer.
    """
    runner = relay.requests.find(request_id)
    record: RequestSummary | None = runner.journal.record if runner is not None else await relay.store.get(request_id)
    if record is None:
        raise RequestNotFoundError(f"request {request_id!r} is not known, or was forgotten; check the id")
    recorded = relay.timelines.find(request_id)
    if recorded is not None and record.gateway_id == relay.gateway_id:
        timeline = timeline_of(recorded, relay.gateway_id, asyncio.get_running_loop().time())
        return inference_pb2.GetTimelineResponse(request=request_info(record), timeline=timeline_to_pb(timeline))
    owners = [member for member in relay.members(MemberRole.GATEWAY) if member.instance_id == record.gateway_id]
    if forwarded or not owners or record.gateway_id == relay.gateway_id:
        why = "it is too long ago, or the gateway that ran it is gone"
        raise RequestNotFoundError(f"the timeline of request {request_id!r} is not kept any more: {why}")
    return await _forward(owners[0].address, request_id)


async def _forward(address: str, request_id: str) -> inference_pb2.GetTimelineResponse:
    async with create_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        message = inference_pb2.GetTimelineRequest(request_id=request_id)
        try:
            return await stub.GetTimeline(message, timeout=FORWARD_TIMEOUT_S, metadata=(FORWARDED_METADATA,))
        except grpc.aio.AioRpcError as failure:
            raise error_of_rpc(failure) from failure
