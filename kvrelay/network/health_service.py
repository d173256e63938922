"""grpc.health.v1.Health with a bounded number of watches.

A watcher that does not read delays neither the others nor a change of the status.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.core.bounds import check_length
from kvrelay.errors import OverloadedError

MAX_WATCHES = 1024
"""Of all connections; each takes about 11 KiB."""
RETRY_AFTER_MS = 5000

Context = grpc.aio.ServicerContext[Any, Any]
Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
    def __init__(self) -> None:
        self.num_watches = 0
        self._statuses: dict[str, Any] = {"": Status.SERVING}
        self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Status:
        if (status := self._statuses.get(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service is here")
        return Status(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Raises OverloadedError above MAX_WATCHES."""
        check_length("service", request.service)
        if self.num_watches >= MAX_WATCHES:
            raise OverloadedError(f"{MAX_WATCHES} watches are open, the most here; call Check instead", RETRY_AFTER_MS)
        self.num_watches += 1
        try:
            await self._tell(request.service, context)
        finally:
            self.num_watches -= 1

    async def set(self, service: str, status: Any) -> None:
        if self._statuses.get(service) == status:
            return
        self._statuses[service] = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _tell(self, service: str, context: Context) -> None:
        told: Any = None
        while True:
            changed = self._changed  # before the look: no change is missed
            status = self._statuses.get(service, Status.SERVICE_UNKNOWN)
            if status != told:
                await context.write(Status(status=status))
            told = status
            await changed.wait()
