"""What one session is still to be told of a prefix cache. Pure.

changes  ->  pending  ->  take, with each message
                |
                '-- too many: forget all, then all that is cached
"""

from collections.abc import Iterable

from kvrelay.core.job import CacheChanges
from kvrelay.kv_cache.pending_changes import PendingChanges

MAX_CHANGES_IN_MESSAGE = 1024
MAX_PENDING_CHANGES = 8192


class CacheFeed:
    """Begins with the whole cache. `cached` is kept and read again when changes pile up."""

    def __init__(self, cached: Iterable[bytes]) -> None:
        self._cached = cached
        self._forgets_all = True
        self._listed = list(cached)
        self._pending = PendingChanges()

    @property
    def has_news(self) -> bool:
        return bool(self._forgets_all or self._listed or self._pending)

    def add(self, changes: CacheChanges) -> None:
        """`cached` has them already."""
        for prefix in changes.published:
            self._pending.publish(prefix)
        for prefix in changes.evicted:
            self._pending.evict(prefix)
        if len(self._pending) > MAX_PENDING_CHANGES:
            self._forgets_all = True
            self._listed = list(self._cached)
            self._pending = PendingChanges()

    def take(self) -> CacheChanges:
        forgets_all, self._forgets_all = self._forgets_all, False
        if forgets_all or self._listed:
            listed = self._listed[-MAX_CHANGES_IN_MESSAGE:]
            del self._listed[-MAX_CHANGES_IN_MESSAGE:]
            return CacheChanges(tuple(listed), forgets_all=forgets_all)
        return self._pending.take(MAX_CHANGES_IN_MESSAGE)
