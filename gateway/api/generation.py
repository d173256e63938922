"""Starts a Generate request, or joins the one with the same idempotency key."""

import asyncio

from gateway.api.idempotency import IdempotencyKeys
from gateway.requests.prompt_preparation import PromptPreparation
from gateway.requests.starter import RequestStarter
from gateway.requests.tenants import tenant_of_call
from gateway.resume.stored_output import FrameReader, RequestOutputs
from kvrelay.v1 import inference_pb2

APPEARANCE_TIMEOUT_S = 3.0
"""The owner of a new request may not have written it yet."""
APPEARANCE_INTERVAL_S = 0.05


class Generation:
    def __init__(
        self, preparation: PromptPreparation, starter: RequestStarter, outputs: RequestOutputs, keys: IdempotencyKeys
    ) -> None:
        self._preparation = preparation
        self._starter = starter
        self._outputs = outputs
        self._keys = keys

    async def open(self, request: inference_pb2.GenerateRequest, deadline: float) -> FrameReader:
        """`deadline` in monotonic seconds.

        Raises:
            KvrelayError: the request is refused; nothing was spent on it.
        """
        now = asyncio.get_running_loop().time()
        request.tenant = tenant_of_call(request.tenant)
        if request.idempotency_key:
            self._starter.check_open()  # joining a running request needs no room
            return await self._open_once(request, now, deadline)
        async with self._starter.place(request.tenant, deadline) as place:
            prepared = await self._preparation.prepare(request, now, deadline)
            return self._starter.start(prepared, place).open_reader()

    async def _open_once(self, request: inference_pb2.GenerateRequest, now: float, deadline: float) -> FrameReader:
        while True:
            async with self._keys.lock(request) as claim:
                if claim.request_id is None:
                    prepared = await self._preparation.prepare(request, now, deadline)
                    if await claim.make(prepared):
                        # Another gateway with the key waits for the request to appear.
                        until = min(deadline, asyncio.get_running_loop().time() + APPEARANCE_TIMEOUT_S / 2)
                        async with self._starter.place(request.tenant, until) as place:
                            return self._starter.start(prepared, place).open_reader()
            assert claim.request_id is not None, "claimed"
            if await self._is_known(claim.request_id):
                return await self._outputs.open_reader(claim.request_id)
            # Its owner died before writing it, or it was forgotten.
            await claim.forget()

    async def _is_known(self, request_id: str) -> bool:
        end = asyncio.get_running_loop().time() + APPEARANCE_TIMEOUT_S
        while not await self._outputs.exists(request_id):
            if asyncio.get_running_loop().time() > end:
                return False
            await asyncio.sleep(APPEARANCE_INTERVAL_S)
        return True
