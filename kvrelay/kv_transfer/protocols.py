"""The KV pool as transfers see it."""

from collections.abc import Sequence
from typing import Protocol

from kvrelay.kv_transfer.layout import KVSpan


class KVExporter(Protocol):
    def export_kv(self, buffer: memoryview, span: KVSpan, block_ids: Sequence[int]) -> None:
        """Fills the buffer with [layers, 2 (K, V), tokens, kv_heads, head_dim]."""


class KVImporter(Protocol):
    def import_kv(self, payload: memoryview | bytes, span: KVSpan, block_ids: Sequence[int]) -> None:
        """Copies what `export_kv` gave into the pool."""
