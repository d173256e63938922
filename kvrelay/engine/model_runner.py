"""Runs one step of a model over the paged KV pool: a flat batch of tokens in, logits of the wanted rows out.

Knows nothing of requests, of scheduling, or of how a token is chosen from logits.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvrelay.engine.attention_context import AttentionContext
from kvrelay.engine.loaded_model import LoadedModel
from kvrelay.engine.paged_attention import CONTEXT_ARGUMENT
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.engine.step_input import StepInput

__all__ = ["ModelRunner", "StepInput"]


class ModelRunner:
    """One model and its pool. Used by one thread.

    Args:
        model: a loaded model.
        cache: a pool of the model's layout, on its device.
    """

    def __init__(self, model: LoadedModel, cache: PagedKVCache) -> None:
        assert cache.layout == model.spec.kv_layout, "the pool has another layout than the model"
        self.model = model
        self.cache = cache
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters

    def run(self, batch: Sequence[StepInput], on_layer_written: Callable[[int], None] | None = None) -> Tensor:
        """Computes the new tokens of all sequences in one pass; their K and V are in the pool afterwards.

        A sequence's result does not depend on the others in the batch; in torch, but for rounding.

        Args:
            batch: at least one sequence, each with at least one token; no two may write to the same block.
            on_layer_written: called with each layer, from 0, when K and V of the whole step are in the pool.

        Returns:
            float32 [sum of the inputs' `num_logits`, vocab_size], in the order of the batch, on the model's device.
        """
        assert batch, "a step without tokens"
        assert all(item.token_ids for item in batch), "a sequence without tokens"
        assert all(0 <= item.num_logits <= len(item.token_ids) for item in batch), "logits are those of an input's own tokens"
        if self.model.decoder is not None:
            return self.model.decoder.run(batch, self.cache, on_layer_written)
        with torch.inference_mode():
            context = AttentionContext(self.cache, batch, on_layer_written, self.model.kernels)
            return forward_flat(self.model.module, batch, context, self.model.device, self._keeps_logits)


def forward_flat(module: Any, batch: Sequence[StepInput], context: object, device: torch.device, keeps_logits: bool) -> Tensor:
    """One forward of the flat batch.

    Args:
        module: a causal language model whose attention is ours.
        batch: the step's inputs.
        context: what the attention function receives.
        device: the model's device.
        keeps_logits: whether the forward knows `logits_to_keep`; otherwise logits of all tokens are computed.

    Returns:
        float32 [sum of the inputs' `num_logits`, vocab_size].
    """
    token_ids = [token_id for item in batch for token_id in item.token_ids]
    positions = [position for item in batch for position in range(item.position, item.position + len(item.token_ids))]
    rows = torch.tensor(_wanted_rows(batch), dtype=torch.int64, device=device)
    arguments: dict[str, Any] = {CONTEXT_ARGUMENT: context}
    if keeps_logits:
        arguments["logits_to_keep"] = rows
    output = module(
        input_ids=torch.tensor([token_ids], device=device),  # [1, num_tokens]
        position_ids=torch.tensor([positions], device=device),  # [1, num_tokens]
        use_cache=False,
        **arguments,
    )
    logits: Tensor = output.logits[0]
    if not keeps_logits:
        logits = logits.index_select(0, rows)
    return logits.float()


def _wanted_rows(batch: Sequence[StepInput]) -> list[int]:
    """Rows of the flat batch whose logits are wanted: the last `num_logits` of every input."""
    rows: list[int] = []
    end = 0
    for item in batch:
        end += len(item.token_ids)
        rows.extend(range(end - item.num_logits, end))
    return rows
