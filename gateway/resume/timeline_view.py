"""Returns a request's timeline, from here or from its owner."""

import asyncio

from gateway.requests.known_requests import KnownRequests, request_info
from gateway.state.other_gateways import FORWARD_TIMEOUT_S, FORWARDED_METADATA, OtherGateways
from gateway.telemetry.timeline_spans import timeline_of
from gateway.telemetry.timelines import Timelines
from kvrelay.core.quoting import quoted
from kvrelay.errors import RequestNotFoundError
from kvrelay.v1 import inference_pb2
from kvrelay.wire.timeline import timeline_to_pb


class TimelineView:
    def __init__(self, known: KnownRequests, timelines: Timelines, gateways: OtherGateways) -> None:
        self._known = known
        self._timelines = timelines
        self._gateways = gateways

    async def get(self, request_id: str, *, forwarded: bool) -> inference_pb2.GetTimelineResponse:
        """`forwarded`: another gateway asks, because it takes this one for the owner.

        Raises:
            RequestNotFoundError: no such request, or its timeline is gone.
            UnavailableError: the owner does not answer.
        """
        record = await self._known.get(request_id)
        recorded = self._timelines.find(request_id)
        own_id = self._gateways.own_id
        if recorded is not None and record.gateway_id == own_id:
            timeline = timeline_of(recorded, own_id, asyncio.get_running_loop().time())
            return inference_pb2.GetTimelineResponse(request=request_info(record), timeline=timeline_to_pb(timeline))
        address = self._gateways.address_of(record.gateway_id)
        if forwarded or address is None:
            why = "it is too long ago, or the gateway that ran it is gone"
            raise RequestNotFoundError(f"the timeline of request {quoted(request_id)} is no longer kept: {why}")
        message = inference_pb2.GetTimelineRequest(request_id=request_id)
        async with self._gateways.calling(address) as stub:
            return await stub.GetTimeline(message, timeout=FORWARD_TIMEOUT_S, metadata=(FORWARDED_METADATA,))
