"""Streams an output that only its gateway has."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from gateway.state.other_gateways import FORWARDED_METADATA, OtherGateways
from gateway.streaming.frames import Frame, decode_frame
from kvrelay.v1 import inference_pb2


class ForwardedOutputReader:
    def __init__(
        self, gateways: OtherGateways, address: str, request_id: str, from_index: int, timeout_s: float
    ) -> None:
        self._gateways = gateways
        self._address = address
        self._message = inference_pb2.ResumeRequest(request_id=request_id, from_index=from_index)
        self._timeout_s = timeout_s
        self._call: grpc.aio.UnaryStreamCall[Any, inference_pb2.ResumeResponse] | None = None
        self._closed = False

    def close(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Raises what the owner answers; UnavailableError when it dies."""
        self._message.coalesce_ms = round(coalesce_s * 1000)
        async with self._gateways.calling(self._address) as stub:
            if self._closed:
                return
            call: Any = stub.Resume(self._message, timeout=self._timeout_s, metadata=(FORWARDED_METADATA,))
            self._call = call
            # Not `async for`: a call and its iterator hold each other, and so the connection.
            while (response := await call.read()) is not grpc.aio.EOF:
                yield [decode_frame(response.SerializeToString())]
