"""What a prefix cache gained and lost since the last look. Pure."""

from kvrelay.core.job import CacheChanges


class PendingChanges:
    """What comes and goes between two looks cancels out."""

    def __init__(self) -> None:
        self._is_published: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._is_published)

    def publish(self, prefix: bytes) -> None:
        self._change(prefix, is_published=True)

    def evict(self, prefix: bytes) -> None:
        self._change(prefix, is_published=False)

    def take(self, max_changes: int | None = None) -> CacheChanges:
        taken = list(self._is_published.items())[:max_changes]
        if len(taken) == len(self._is_published):
            self._is_published.clear()
        for prefix, _ in taken if self._is_published else ():
            del self._is_published[prefix]
        return CacheChanges(
            tuple(prefix for prefix, is_published in taken if is_published),
            tuple(prefix for prefix, is_published in taken if not is_published),
        )

    def _change(self, prefix: bytes, *, is_published: bool) -> None:
        before = self._is_published.pop(prefix, None)
        assert before is not is_published, "a prefix is published once and evicted once"
        if before is None:
            self._is_published[prefix] = is_published
