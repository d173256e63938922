"""The KV pool as transfers see it: bytes of a range of layers and tokens, out of it and into it. Knows nothing of tensors."""

from collections.abc import Sequence
from typing import Protocol


class KVExporter(Protocol):
    """A pool that a sender reads."""

    def export_kv_into(
        self,
        buffer: memoryview,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
    ) -> None:
        """Fills the buffer with [layers, 2 (K, V), tokens, kv_heads, head_dim]."""


class KVImporter(Protocol):
    """A pool that a receiver writes."""

    def import_kv(
        self,
        payload: memoryview | bytes,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
    ) -> None:
        """Copies K and V, in the same order, into the pool."""
