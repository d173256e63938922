"""Begins a Generate request, or joins the one that its idempotency key stands for."""

import asyncio

from gateway.generation_request import GenerationRequest
from gateway.idempotency import IdempotencyKeys, body_digest
from gateway.prompt_preparation import prepare
from gateway.relay import Relay
from gateway.stored_output import FrameReader, open_reader
from kvrelay.v1 import inference_pb2

APPEARANCE_TIMEOUT_S = 3.0
"""How long a request may be unknown to the store that its owner is just about to write."""
APPEARANCE_INTERVAL_S = 0.05


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
            return await self._open_once(request, now, deadline)  # it may run already: then it needs no room
        self._relay.check_room()
        return self._relay.start(await prepare(request, self._relay, now, deadline)).open_reader()

    async def _open_once(self, request: inference_pb2.GenerateRequest, now: float, deadline: float) -> FrameReader:
        prepared: GenerationRequest | None = None

        async def begin() -> str:
            nonlocal prepared
            prepared = await prepare(request, self._relay, now, deadline)
            return prepared.request_id

        tenant, key = request.tenant, request.idempotency_key
        ttl_ms = int((deadline - now) * 1000) + self._relay.settings.retention_ms
        while joined := await self._keys.begin_or_join(tenant, key, body_digest(request), ttl_ms, begin):
            if await self._is_known(joined.request_id):
                return open_reader(self._relay, joined.request_id)
            # Whoever claimed the key died before the request was written, or the request was forgotten.
            await self._keys.forget(tenant, key, joined.request_id)
        assert prepared is not None, "begun here"
        try:
            reader = self._relay.start(prepared).open_reader()
        except BaseException:
            await self._keys.give_up(tenant, key, prepared.request_id)
            raise
        self._keys.settle(tenant, key, prepared.request_id)
        return reader

    async def _is_known(self, request_id: str) -> bool:
        """Whether a request runs here or is in the store, where its owner may be just about to write it."""
        give_up = asyncio.get_running_loop().time() + APPEARANCE_TIMEOUT_S
        while self._relay.requests.find(request_id) is None and await self._relay.store.get(request_id) is None:
            if asyncio.get_running_loop().time() > give_up:
                return False
            await asyncio.sleep(APPEARANCE_INTERVAL_S)
        return True
