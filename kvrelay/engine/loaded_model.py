"""A model in memory, ready to run."""

from dataclasses import dataclass
from typing import Any

import torch

from kvrelay.engine.fused_decoder import FusedDecoder
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A transformers causal language model whose attention goes through ours, and what it is to everything without tensors."""

    module: Any
    """In eval mode, without gradients."""
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    """Memory of the parameters and buffers."""
    decoder: FusedDecoder | None = None
    """Runs the model in place of the module, which then has no weights of its own."""
    kernels: NativeLibrary | None = None
    """Run the module's linear layers and its attention, or the decoder."""
