"""A session of a worker with itself: by it, VllmEngine on a worker gives it works as a gateway would, without a stream."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from typing import Any

from kvrelay.worker_session import WorkerSession

LOCAL_GATEWAY_ID = "vllm-engine"


class LocalSession(WorkerSession):
    """Takes what a gateway would be sent. One for each request, whose works end with it."""

    def __init__(self) -> None:
        # Not the base's: there is neither a stream nor anybody who could fall silent.
        self.gateway_id = LOCAL_GATEWAY_ID
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        """Names and values of messages, of one request's works: as many as it has tokens, at the most."""

    def send(self, **message: Any) -> None:
        for event in message.items():
            self.events.put_nowait(event)
