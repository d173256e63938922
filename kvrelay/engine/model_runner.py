"""Runs one step of a model over the paged KV pool."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvrelay.core.model_spec import ModelSpec
from kvrelay.engine.attention_metadata import AttentionMetadata
from kvrelay.engine.kernel_batch import KernelBatch, SequenceInput
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.native_decoder import NativeDecoder
from kvrelay.engine.paged_attention import METADATA_ARGUMENT
from kvrelay.engine.paged_kv_cache import PagedKVCache


@dataclass(frozen=True, slots=True)
class LoadedModel:
    module: Any  # in eval mode, without gradients
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int  # parameters and buffers
    windows: tuple[int | None, ...]  # of each layer, as the module applies it; None: all
    # Replaces the module, which then has no weights of its own.
    decoder: NativeDecoder | None = None
    kernels: NativeLibrary | None = None  # for decoder, linear layers and attention
    scheme: str = ""  # of the kernels' weights, if it is not float32
    num_parts: int = 0  # in bfloat16, of what the kernels multiply by such weights and KV
    is_narrow: bool = False  # computes in float32, slowly, on bfloat16 weights: kernels are to take these


class ModelRunner:
    """Used by one thread."""

    def __init__(self, model: LoadedModel, cache: PagedKVCache) -> None:
        assert cache.layout == model.spec.kv_layout, "the pool has another layout than the model"
        self.model = model
        self.cache = cache
        self._keeps_logits = keeps_logits(model.module)

    def run(self, batch: Sequence[SequenceInput], on_layer_written: Callable[[int], None] | None = None) -> Tensor:
        """Computes the new tokens of all sequences, and puts K and V into the pool.

        A sequence's result does not depend on the batch; in torch, except for rounding. No block is
        written twice.

        Args:
            on_layer_written: called with each layer, once the step's K and V are in the pool.

        Returns:
            float32 [sum of the inputs' `num_logits`, vocab_size], in order.
        """
        assert batch, "a step without tokens"
        assert all(item.token_ids for item in batch), "a sequence without tokens"
        assert all(0 <= item.num_logits <= len(item.token_ids) for item in batch), (
            "logits are those of an input's own tokens"
        )
        if self.model.decoder is not None:
            return self.model.decoder.run(KernelBatch(batch, self.cache.block_size), self.cache, on_layer_written)
        with torch.inference_mode():
            metadata = AttentionMetadata(self.cache, batch, on_layer_written, self.model.kernels, self.model.num_parts)
            return forward_flat(
                self.model.module, metadata.kernel_batch, metadata, self.model.device, self._keeps_logits
            )


def forward_flat(module: Any, batch: KernelBatch, metadata: object, device: torch.device, keeps_logits: bool) -> Tensor:
    """float32 [sum of the inputs' `num_logits`, vocab_size]."""
    rows = torch.from_numpy(batch.logit_rows).to(device)
    arguments: dict[str, Any] = {METADATA_ARGUMENT: metadata}
    if keeps_logits:
        arguments["logits_to_keep"] = rows
    output = module(
        input_ids=torch.from_numpy(batch.token_ids).to(device).unsqueeze(0),  # [1, num_tokens]
        position_ids=torch.from_numpy(batch.positions).to(device).unsqueeze(0),  # [1, num_tokens]
        use_cache=False,
        **arguments,
    )
    logits: Tensor = output.logits[0]
    if not keeps_logits:
        logits = logits.index_select(0, rows)
    return logits.float()


def keeps_logits(module: Any) -> bool:
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def use_torch_threads(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
