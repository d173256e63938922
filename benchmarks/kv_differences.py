"""Bit for bit, how the keys and values of one prefix differ. Arithmetic only: runs no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KV = NDArray[np.float32]
"""[num_layers, 2 (K, V), num_tokens, num_kv_heads, head_dim]"""


@dataclass(frozen=True, slots=True)
class KVDifferences:
    """What a continuation changed in a prefix's KV; of several, the worst of each layer."""

    num_elements: int
    """Of one layer."""
    num_equal: tuple[int, ...]
    """Elements with the same bits, by layer."""
    num_stale_tokens: tuple[int, ...]
    """Tokens with an element that differs, by layer."""
    max_difference: tuple[float, ...]
    """By layer."""

    @property
    def equal_layers(self) -> tuple[int, ...]:
        """Layers in which every bit is the same."""
        return tuple(layer for layer, number in enumerate(self.num_equal) if number == self.num_elements)


def compare_kv(alone: KV, followed: Sequence[KV]) -> KVDifferences:
    """The prefix by itself, and the same prefix before one continuation or more."""
    bits = alone.view(np.uint32)
    differs = np.stack([each.view(np.uint32) != bits for each in followed])
    distances = np.stack([np.abs(each - alone).max(axis=(1, 2, 3, 4)) for each in followed])
    num_elements = alone[0].size
    num_different = differs.sum(axis=(2, 3, 4, 5)).max(axis=0)
    num_stale_tokens = differs.any(axis=(2, 4, 5)).sum(axis=2).max(axis=0)
    return KVDifferences(
        num_elements=num_elements,
        num_equal=tuple((num_elements - num_different).tolist()),
        num_stale_tokens=tuple(num_stale_tokens.tolist()),
        max_difference=tuple(distances.max(axis=0).tolist()),
    )


def tokens_to_compute(differences: KVDifferences, num_new_tokens: int) -> tuple[int, ...]:
    """Tokens whose K and V are to be computed when new ones are appended, by layer."""
    return tuple(num_new_tokens + stale for stale in differences.num_stale_tokens)
