"""transformers' model under a mask of ours, causal or two-way. Knows nothing of kvrelay."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.float32_model import load_in_float32
from benchmarks.kv_differences import KV
from benchmarks.torch_threads import torch_threads


def attention_mask(num_rows: int, num_past: int, *, two_way: bool, num_seen: int | None = None) -> Tensor:
    """Who sees whom: bool [1, 1, num_rows, num_past + num_rows].

    Args:
        num_seen: two-way, how many tokens all see; None: every one.
    """
    num_keys = num_past + num_rows
    keys = torch.arange(num_keys)
    seen = keys < (num_keys if num_seen is None else num_seen)
    if two_way:
        return seen.expand(1, 1, num_rows, num_keys)
    rows = torch.arange(num_past, num_keys).unsqueeze(1)
    return (keys <= rows).expand(1, 1, num_rows, num_keys)


class MaskedModel:
    """In float32.

    Args:
        folder: of a model in whose layers every token may see all others.
        num_threads: CPU threads.
    """

    def __init__(self, folder: Path, num_threads: int) -> None:
        self._num_threads = num_threads
        self._model = load_in_float32(folder, attn_implementation="sdpa")

    def keys_and_values(self, token_ids: Sequence[int], num_tokens: int, *, two_way: bool) -> KV:
        """K and V of the first tokens."""
        return self._kv(token_ids, num_tokens, attention_mask(len(token_ids), 0, two_way=two_way))

    def padded_keys_and_values(self, token_ids: Sequence[int], num_rows: int, *, two_way: bool) -> KV:
        """K and V of all tokens, with rows behind them that none of them sees.

        So the matrices have the shape that they have with a continuation.
        """
        padded = [*token_ids, *[token_ids[0]] * (num_rows - len(token_ids))]
        mask = attention_mask(num_rows, 0, two_way=two_way, num_seen=len(token_ids))
        return self._kv(padded, len(token_ids), mask)

    def generate(self, prompt: Sequence[int], *, two_way: bool, keeps_cache: bool) -> Iterator[int]:
        """The likeliest tokens, without end.

        Args:
            keeps_cache: computes each new token over the KV there is; else all tokens anew.
        """
        token_ids = list(prompt)
        cache = DynamicCache()
        while True:
            if not keeps_cache:
                cache = DynamicCache()
            num_past = cache.get_seq_length()
            mask = attention_mask(len(token_ids) - num_past, num_past, two_way=two_way)
            token_ids.append(int(self._forward(token_ids[num_past:], mask, cache).argmax()))
            yield token_ids[-1]

    def append_seconds(self, token_ids: Sequence[int], num_new: int) -> tuple[float, float]:
        """Seconds of the new tokens over the others' KV, causal; and of all tokens, two-way."""
        num_past = len(token_ids) - num_new
        cache = DynamicCache()
        self._forward(token_ids[:num_past], attention_mask(num_past, 0, two_way=False), cache)
        mask, whole_mask = (
            attention_mask(num_new, num_past, two_way=False),
            attention_mask(len(token_ids), 0, two_way=True),
        )
        begin_s = time.perf_counter()
        self._forward(token_ids[num_past:], mask, cache)
        middle_s = time.perf_counter()
        self._forward(token_ids, whole_mask, DynamicCache())
        return middle_s - begin_s, time.perf_counter() - middle_s

    def _kv(self, token_ids: Sequence[int], num_tokens: int, mask: Tensor) -> KV:
        cache = DynamicCache()
        self._forward(token_ids, mask, cache)
        cached: Any = cache.layers
        layers = [(layer.keys, layer.values) for layer in cached]  # each [1, num_kv_heads, num_rows, head_dim]
        found = [[side[0, :, :num_tokens].transpose(0, 1).numpy() for side in layer] for layer in layers]
        return np.ascontiguousarray(np.array(found))

    def _forward(self, token_ids: Sequence[int], mask: Tensor, cache: DynamicCache) -> Tensor:
        """The last token's logits, [vocab_size]. Adds to the cache."""
        with torch_threads(self._num_threads), torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(token_ids)]),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[0, -1]
        return logits
