"""Begins a Generate request, or joins the one that its idempotency key stands for."""

import asyncio

from gateway.generation_request import GenerationRequest
from gateway.idempotency import IdempotencyKeys, body_digest
from gateway.prompt_preparation import prepare
from gateway.relay import Relay
from gateway.stored_output import FrameReader, open_reader
from kvrelay.v1 import inference_pb2


class Generation:
    """What Generate does, without its stream.

    Args:
        relay: this gateway.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._keys = IdempotencyKeys(relay.store)

    async def open(self, request: inference_pb2.GenerateRequest, deadline: float) -> FrameReader:
        """A reader of the request's output.

        Args:
            request: as the client sent it.
            deadline: monotonic seconds.

        Raises:
            KvrelayError: the request is refused; nothing was spent on it.
        """
        self._relay.check_open()
        now = asyncio.get_running_loop().time()
        if request.idempotency_key:
            return await self._open_once(request, now, deadline)
        return self._relay.start(await prepare(request, self._relay, now, deadline)).open_reader()

    async def _open_once(self, request: inference_pb2.GenerateRequest, now: float, deadline: float) -> FrameReader:
        prepared: GenerationRequest | None = None

        async def begin() -> str:
            nonlocal prepared
            prepared = await prepare(request, self._relay, now, deadline)
            return prepared.request_id

        tenant, key = request.tenant, request.idempotency_key
        ttl_ms = int((deadline - now) * 1000) + self._relay.settings.retention_ms
        joined = await self._keys.begin_or_join(tenant, key, body_digest(request), ttl_ms, begin)
        if joined is not None:
            return open_reader(self._relay, joined.request_id, may_appear=True)
        assert prepared is not None, "begun here"
        try:
            reader = self._relay.start(prepared).open_reader()
        except BaseException:
            await self._keys.forget(tenant, key, prepared.request_id)
            raise
        self._keys.settle(tenant, key, prepared.request_id)
        return reader
