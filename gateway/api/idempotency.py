"""Maps a tenant's idempotency keys to requests, here and in the store."""

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.lifecycle.generation_request import GenerationRequest
from kvrelay.errors import IdempotencyConflictError, UnavailableError
from kvrelay.state.state_store import StateStore
from kvrelay.v1 import inference_pb2

MAX_KEYS = 2048
"""Keys cached locally; the store has all. While it is down, only these are known."""
LONGEST_WAIT_FOR_STORE_S = 1.0
"""First wait for an unreachable store. Later calls fail at once."""


@dataclass(slots=True)
class _Entry:
    body_digest: str
    settled: asyncio.Event | None = field(default_factory=asyncio.Event)
    """None once set, to save memory."""
    request_id: str | None = None
    """None until settled, and after a failure."""


class IdempotencyKeys:
    """Keys of this gateway's requests; the oldest are dropped first.

    While the store is down, keys hold within this gateway only: a request served twice is better
    than one refused.
    """

    def __init__(self, store: StateStore, retention_ms: int) -> None:
        self._store = store
        self._retention_ms = retention_ms
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._away_since: float | None = None

    @asynccontextmanager
    async def lock(self, message: inference_pb2.GenerateRequest) -> AsyncIterator["KeyClaim"]:
        """Lets one caller with a key start its request while others wait.

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """
        name, digest = (message.tenant, message.idempotency_key), body_digest(message)
        while (entry := self._entries.get(name)) is not None:
            if entry.body_digest != digest:
                raise IdempotencyConflictError("idempotency_key was used with another request body; use a new key")
            if entry.settled is not None:
                await entry.settled.wait()
            if entry.request_id is not None:
                yield KeyClaim(self, name, digest, entry.request_id)
                return
        entry = self._entries[name] = _Entry(digest)
        claim = KeyClaim(self, name, digest)
        try:
            yield claim
        except BaseException:
            del self._entries[name]
            _settle(entry)
            if claim.request_id is not None:
                await self._release(*name, claim.request_id)
            raise
        entry.request_id = claim.request_id
        _settle(entry)
        self._drop_surplus()

    async def _claim(self, name: tuple[str, str], digest: str, request: GenerationRequest) -> str:
        """Returns `request` itself if the store does not answer."""
        ttl_ms = int((request.deadline - request.submit_time) * 1000) + self._retention_ms
        while True:
            try:
                owner = await self._store.claim_idempotency_key(*name, digest, request.request_id, ttl_ms)
            except UnavailableError:
                if not await self._wait_for_store():
                    return request.request_id
            else:
                self._away_since = None
                return owner

    async def _wait_for_store(self) -> bool:
        """Whether to ask again."""
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
        # Another claim may succeed while this one waits.
        end = self._away_since + LONGEST_WAIT_FOR_STORE_S
        try:
            async with asyncio.timeout_at(end):
                await self._store.health.wait_until_healthy()
        except TimeoutError:
            return False
        return asyncio.get_running_loop().time() < end

    def _drop_surplus(self) -> None:
        while len(self._entries) > MAX_KEYS:
            del self._entries[next(name for name, other in self._entries.items() if other.settled is None)]

    async def _release(self, tenant: str, key: str, request_id: str) -> None:
        with contextlib.suppress(UnavailableError):
            await self._store.release_idempotency_key(tenant, key, request_id)


class KeyClaim:
    """One caller's hold on a key. `request_id` is None while the key has no request."""

    def __init__(
        self, keys: IdempotencyKeys, name: tuple[str, str], digest: str, request_id: str | None = None
    ) -> None:
        self.request_id = request_id
        self._keys = keys
        self._name = name
        self._digest = digest

    async def make(self, request: GenerationRequest) -> bool:
        """Returns False if another gateway was faster. Start the request before the key is
        unlocked.
        """
        self.request_id = await self._keys._claim(self._name, self._digest, request)
        return self.request_id == request.request_id

    async def forget(self) -> None:
        """Frees the key of a request that no gateway knows."""
        assert self.request_id is not None, "claimed"
        entry = self._keys._entries.get(self._name)
        if entry is not None and entry.request_id == self.request_id:
            del self._keys._entries[self._name]
        await self._keys._release(*self._name, self.request_id)


def _settle(entry: _Entry) -> None:
    settled, entry.settled = entry.settled, None
    if settled is not None:
        settled.set()


def body_digest(request: inference_pb2.GenerateRequest) -> str:
    body = inference_pb2.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("idempotency_key")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()
