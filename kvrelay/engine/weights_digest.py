"""Tells workers that they serve the same weights."""

from typing import Any

import torch
import xxhash
from torch import Tensor

from kvrelay.engine.mapped_weights import pages_in_use

FULL_DIGEST_BYTES = 1024**3  # larger models are sampled
SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_TENSOR = 8
_ELEMENTS_AT_ONCE = 1024 * 1024


def weights_digest(module: Any, dtype: torch.dtype | None = None) -> str:
    """xxh3-128 over names, shapes, dtypes and bytes of the state dict: 32 hex digits.

    Models over 1 GiB are sampled: at most 8 stretches of 64 KiB of each tensor.

    Args:
        dtype: that floating tensors are to be digested in, a few at once.
    """
    state: dict[str, Tensor] = module.state_dict()
    dtypes = {name: dtype if dtype and tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    total_bytes = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in state.items())
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor, wanted = state[name], dtypes[name]
        digest.update(f"{name} {tuple(tensor.shape)} {wanted}\x00".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        num_bytes = flat.numel() * wanted.itemsize
        for begin, end in _stretches(num_bytes, sample=total_bytes > FULL_DIGEST_BYTES):
            _digest_bytes(digest, flat, wanted, begin, end)
    return digest.hexdigest()


def _digest_bytes(digest: xxhash.xxh3_128, flat: Tensor, dtype: torch.dtype, begin: int, end: int) -> None:
    """Of what the tensor's bytes would be in that type."""
    size = dtype.itemsize
    for first in range(begin // size, -(-end // size), _ELEMENTS_AT_ONCE):
        part = flat[first : first + _ELEMENTS_AT_ONCE].to(dtype).view(torch.uint8)
        part = part[max(begin - first * size, 0) : end - first * size]
        digest.update(part.cpu().numpy().data)
        pages_in_use.count(part.nbytes)


def _stretches(num_bytes: int, *, sample: bool) -> list[tuple[int, int]]:
    if not sample or num_bytes <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        return [(0, num_bytes)]
    step = (num_bytes - SAMPLE_BYTES) // (SAMPLES_PER_TENSOR - 1)
    return [(number * step, number * step + SAMPLE_BYTES) for number in range(SAMPLES_PER_TENSOR)]
