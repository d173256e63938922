"""Tells workers that they serve the same weights."""

from typing import Any

import torch
import xxhash
from torch import Tensor

FULL_DIGEST_BYTES = 1024**3  # larger models are sampled
SAMPLE_BYTES = 64 * 1024
SAMPLES_PER_TENSOR = 8


def weights_digest(module: Any) -> str:
    """xxh3-128 over names, shapes, dtypes and bytes of the state dict: 32 hex digits.

    Models over 1 GiB are sampled: at most 8 stretches of 64 KiB of each tensor, spread evenly.
    """
    state: dict[str, Tensor] = module.state_dict()
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\x00".encode())
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for begin, end in _stretches(flat.numel(), sample=total_bytes > FULL_DIGEST_BYTES):
            digest.update(flat[begin:end].cpu().numpy().data)
    return digest.hexdigest()


def _stretches(num_bytes: int, *, sample: bool) -> list[tuple[int, int]]:
    if not sample or num_bytes <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        return [(0, num_bytes)]
    step = (num_bytes - SAMPLE_BYTES) // (SAMPLES_PER_TENSOR - 1)
    return [(number * step, number * step + SAMPLE_BYTES) for number in range(SAMPLES_PER_TENSOR)]
