"""Salts of tenants' prefix caches: names that workers can compare and not read."""

import asyncio
import hashlib
import secrets

import structlog

from kvrelay.errors import KvrelayError
from kvrelay.state.state_store import StateStore

SECRET_BYTES = 32
SHARE_INTERVAL_S = 60.0
MAX_CACHED_SALTS = 4096

_log = structlog.get_logger(__name__)


class CacheSalts:
    """A salt is BLAKE2b of the tenant, keyed with a secret of the cluster's gateways.

    Gateways with different secrets work, but share no prefixes. Without `secret`, which is from a
    file, `share` agrees on one.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self._is_given = secret is not None
        self._secret = _key(secret or secrets.token_bytes(SECRET_BYTES))
        self._salts: dict[str, str] = {}

    def of(self, tenant: str) -> str:  # 32 hexadecimal digits
        salt = self._salts.get(tenant)
        if salt is None:
            if len(self._salts) >= MAX_CACHED_SALTS:
                self._salts.clear()
            digest = hashlib.blake2b(tenant.encode(), digest_size=16, key=self._secret, person=b"kvrelay salt")
            salt = self._salts[tenant] = digest.hexdigest()
        return salt

    async def share(self, store: StateStore) -> None:
        """Takes the secret that the other gateways use, or gives them this one.

        Raises KvrelayError if the store cannot be used.
        """
        if self._is_given:
            return
        secret = _key(await store.share_cache_secret(self._secret))
        if secret != self._secret:
            self._secret = secret
            self._salts.clear()

    async def keep_shared(self, store: StateStore) -> None:
        """Renews the secret in the store, which may lose it."""
        while not self._is_given:
            await store.health.wait_until_healthy()
            try:
                await self.share(store)
            except KvrelayError as error:
                _log.warning("the secret of prefix caches cannot be shared now", reason=error.message)
            await asyncio.sleep(SHARE_INTERVAL_S)


def _key(secret: bytes) -> bytes:
    """Keys of BLAKE2b have at most 64 bytes; a file or a broken store may give more."""
    return hashlib.blake2b(secret, digest_size=32).digest() if len(secret) > hashlib.blake2b.MAX_KEY_SIZE else secret
