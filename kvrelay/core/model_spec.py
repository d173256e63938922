"""A model without tensors: sizes, KV layout, fingerprint."""

from dataclasses import dataclass, field

import xxhash

from kvrelay.core.sampling_params import SamplingDefaults

WIRE_VERSION = 2

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
KV_SCALE_BYTES = 4
"""int8 has a float32 per head and token, for K and for V, stored behind the elements."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Per token: `num_layers` times K and V of [num_kv_heads, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """K, or V, of one token in one head."""
        scale_bytes = KV_SCALE_BYTES if self.dtype == "int8" else 0
        return self.head_dim * DTYPE_BYTES[self.dtype] + scale_bytes

    @property
    def bytes_per_layer_token(self) -> int:
        return 2 * self.num_kv_heads * self.row_bytes

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.bytes_per_layer_token


@dataclass(frozen=True, slots=True)
class ModelSpec:
    name: str
    architecture: str
    kv_layout: KVLayout
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)


def fingerprint(weights_digest: str, architecture: str, layout: KVLayout, rope: str, compute: str) -> str:
    """Workers must share it to exchange KV. `compute` names what else changes the KV."""
    parts = (weights_digest, architecture, repr(layout), rope, compute, f"wire {WIRE_VERSION}")
    return xxhash.xxh3_128_hexdigest("\x00".join(parts).encode())


def derive_fingerprint(base: str, change: str) -> str:
    """For a model that stores the numbers of `base` in another way."""
    return xxhash.xxh3_128_hexdigest(f"{base}\x00{change}".encode())
