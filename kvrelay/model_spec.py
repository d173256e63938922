"""What a model is to everything that has no tensors: its sizes, its KV layout and its fingerprint."""

from dataclasses import dataclass

import xxhash

WIRE_VERSION = 2

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
KV_SCALE_BYTES = 4
"""int8: a float32 that a head's numbers are multiplied by, of each token, K and V apart; it lies behind them."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of a KV cache, per token: `num_layers` times K and V of [num_kv_heads, head_dim] elements."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of K, or of V, of one token in one head."""
        scale_bytes = KV_SCALE_BYTES if self.dtype == "int8" else 0
        return self.head_dim * DTYPE_BYTES[self.dtype] + scale_bytes

    @property
    def bytes_per_layer_token(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.row_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return self.num_layers * self.bytes_per_layer_token


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A served model without its weights."""

    name: str
    architecture: str
    kv_layout: KVLayout
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def fingerprint(weights_digest: str, architecture: str, layout: KVLayout, rope: str, compute: str) -> str:
    """Digest that two workers must share to exchange KV: 32 hexadecimal digits.

    Args:
        weights_digest: identity of the weights' bytes.
        architecture: transformers' model type.
        layout: the KV layout, with its dtype.
        rope: canonical text of the rope settings.
        compute: what else changes the numbers in a KV cache, such as the quantization.
    """
    parts = (weights_digest, architecture, repr(layout), rope, compute, f"wire {WIRE_VERSION}")
    return xxhash.xxh3_128_hexdigest("\x00".join(parts).encode())


def derive_fingerprint(base: str, change: str) -> str:
    """The fingerprint of a model that differs from another only in how its numbers are kept.

    Args:
        base: the other's.
        change: canonical text of the difference.
    """
    return xxhash.xxh3_128_hexdigest(f"{base}\x00{change}".encode())
