"""Idempotency keys: which request a tenant's key stands for, at this gateway at once and at all through the store."""

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvrelay.errors import IdempotencyConflictError, UnavailableError
from kvrelay.state_store import StateStore
from kvrelay.v1 import inference_pb2

MAX_KEYS = 2048
"""That are known here without the store, which knows all of them; what this gateway has while the store is away."""
LONGEST_WAIT_FOR_STORE_S = 1.0
"""So long a store that has just gone away is waited for: often it was slow once. Later on nobody waits for it any more."""


@dataclass(slots=True)
class _Entry:
    body_digest: str
    settled: asyncio.Event | None = field(default_factory=asyncio.Event)
    """None once it is set: thousands of settled entries are kept, and nobody waits for them."""
    request_id: str | None = None
    """None until settled, and for ever when the one who began gave up."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The key stands for a request that somebody else began."""

    request_id: str


class IdempotencyKeys:
    """Keys of this gateway's requests, the oldest dropped first; the store knows those of all gateways.

    Args:
        store: shared by all gateways. While it is away for longer than a moment, keys hold within this gateway: nobody else could
            be asked, and a request that is not served because its key cannot be looked up is worse than one that is served twice.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._away_since: float | None = None

    async def begin_or_join(
        self, tenant: str, key: str, digest: str, ttl_ms: int, begin: Callable[[], Awaitable[str]]
    ) -> Joined | None:
        """Lets one of all callers with the same key begin.

        Args:
            tenant: keys are the tenant's own.
            key: the client's key.
            digest: of the request's body.
            ttl_ms: how long the store remembers the key.
            begin: prepares the request and returns its id; the caller starts it after `settle`.

        Returns:
            None for the one that began; it must call `settle` or `give_up`.

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """
        while True:
            entry = self._entries.get((tenant, key))
            if entry is None:
                return await self._begin(tenant, key, digest, ttl_ms, begin)
            if entry.body_digest != digest:
                raise IdempotencyConflictError("idempotency_key was used with another request body; use a new key")
            if entry.settled is not None:
                await entry.settled.wait()
            if entry.request_id is not None:
                return Joined(entry.request_id)

    async def _begin(self, tenant: str, key: str, digest: str, ttl_ms: int, begin: Callable[[], Awaitable[str]]) -> Joined | None:
        self._entries[tenant, key] = _Entry(digest)
        try:
            request_id = await begin()
            owner = await self._claim(tenant, key, digest, request_id, ttl_ms)
        except BaseException:
            self._abandon(tenant, key)
            raise
        if owner == request_id:
            return None
        self.settle(tenant, key, owner)
        return Joined(owner)

    async def _claim(self, tenant: str, key: str, digest: str, request_id: str, ttl_ms: int) -> str:
        while True:
            try:
                claim = await self._store.claim_idempotency_key(tenant, key, digest, request_id, ttl_ms)
            except UnavailableError:
                if not await self._wait_for_store():
                    return request_id
            else:
                self._away_since = None
                return claim.request_id

    async def _wait_for_store(self) -> bool:
        """Whether it is worth asking again: the store answers once more, soon after it was first found to be away."""
        now = asyncio.get_running_loop().time()
        if self._away_since is None:
            self._away_since = now
        give_up_at = self._away_since + LONGEST_WAIT_FOR_STORE_S  # others' claims may succeed while this one waits
        try:
            async with asyncio.timeout_at(give_up_at):
                await self._store.health.wait_until_healthy()
        except TimeoutError:
            return False
        return asyncio.get_running_loop().time() < give_up_at

    def settle(self, tenant: str, key: str, request_id: str) -> None:
        """The request of the key runs, or is known elsewhere."""
        entry = self._entries[tenant, key]
        entry.request_id = request_id
        _settle(entry)
        while len(self._entries) > MAX_KEYS:
            del self._entries[next(name for name, other in self._entries.items() if other.settled is None)]

    async def give_up(self, tenant: str, key: str, request_id: str) -> None:
        """The request was not begun after all: the next caller may."""
        self._abandon(tenant, key)
        await self._release(tenant, key, request_id)

    async def forget(self, tenant: str, key: str, request_id: str) -> None:
        """The request that the key stood for is not known any more, or was never written: the next caller begins anew."""
        entry = self._entries.get((tenant, key))
        if entry is not None and entry.request_id == request_id:
            del self._entries[tenant, key]
        await self._release(tenant, key, request_id)

    def _abandon(self, tenant: str, key: str) -> None:
        entry = self._entries.pop((tenant, key), None)
        if entry is not None:
            _settle(entry)

    async def _release(self, tenant: str, key: str, request_id: str) -> None:
        with contextlib.suppress(UnavailableError):
            await self._store.release_idempotency_key(tenant, key, request_id)


def _settle(entry: _Entry) -> None:
    settled, entry.settled = entry.settled, None
    if settled is not None:
        settled.set()


def body_digest(request: inference_pb2.GenerateRequest) -> str:
    """Digest of a request without its key."""
    body = inference_pb2.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("idempotency_key")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()
