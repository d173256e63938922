"""Attention over the paged KV pool, registered with transformers under ATTENTION_NAME.

A model loaded with `attn_implementation=ATTENTION_NAME` calls `paged_attention` once per layer. It writes the step's K and V into
the pool and attends over the sequences' blocks. The step's plan arrives as the keyword argument CONTEXT_ARGUMENT of the model's
forward. No mask function is registered: for a name without one, transformers builds no mask, and the plan brings its own.

Covers multi-head, grouped-query (Ainslie et al. 2023) and multi-query attention (Shazeer 2019), sliding windows (Beltagy et al.
2020), attention sinks (as in gpt_oss; Xiao et al. 2023) and soft-capped scores (Gemma 2). Knows nothing of models' weights.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as functional
from torch import Tensor

from kvrelay.engine.attention_context import AttentionContext, DecodeGroup, PrefillSegment
from kvrelay.engine.light_import import transformers
from kvrelay.engine.native.library import KV_DTYPES, PANEL, AttentionCall, KVLayer, NativeLibrary
from kvrelay.engine.paged_kv_cache import PagedKVCache

ATTENTION_NAME = "kvrelay_paged"
CONTEXT_ARGUMENT = "kvrelay_context"
MAX_SCORE_ELEMENTS = 16 * 1024 * 1024
"""Most elements of an attention matrix that is made in full; longer chunks are attended to in pieces."""


class AttentionContextMissingError(Exception):
    """A model reached the attention function without passing the context on."""


class NotInKernelsError(Exception):
    """KV is in int8, which only the kernels read, and they do not compute this layer's attention."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores are made from queries and keys."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    """[num_heads]; logits that take part in the softmax and lead nowhere"""
    window: int | None


@runtime_checkable
class AttentionObserver(Protocol):
    """Stands in for the context while a model is probed: is told of each call and computes nothing."""

    def observe(self, module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        """Called once per attention call, with the tensors and the keyword arguments that the model gave."""


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Writes K and V of all tokens of the step into the pool, then attends.

    Args:
        module: the model's attention layer; its `layer_idx` says which.
        query: [1, num_heads, num_tokens, head_dim].
        key: [1, num_kv_heads, num_tokens, head_dim].
        value: same as key.
        attention_mask: not used.
        scaling: factor of the scores; head_dim ** -0.5 when None.
        arguments: the context, and `sliding_window`, `softcap`, `s_aux` where the model has them.

    Returns:
        [1, num_tokens, num_heads, head_dim] and no weights.

    Raises:
        AttentionContextMissingError: the model did not pass the context on.
        NotInKernelsError: KV is in int8 and the kernels cannot compute this; at load already, when the model is tried out.
    """
    context = arguments.get(CONTEXT_ARGUMENT)
    if not isinstance(context, AttentionContext):
        if not isinstance(context, AttentionObserver):
            raise AttentionContextMissingError
        context.observe(module, query, key, value, arguments)
        return torch.zeros_like(query).transpose(1, 2), None
    layer: int = module.layer_idx
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux"),
        window=arguments["sliding_window"] if "sliding_window" in arguments else getattr(module, "sliding_window", None),
    )
    is_plain = scoring.softcap is None and scoring.sinks is None and query.shape[3] % PANEL == 0
    kernels = context.kernels if is_plain else None
    _write(context, kernels, layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if context.on_layer_written is not None:
        context.on_layer_written(layer)
    if kernels is not None:
        return _attend_in_kernels(context, kernels, layer, query[0].transpose(0, 1), scoring).unsqueeze(0), None
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # [num_tokens, num_heads, head_dim]
    for segment in context.prefill:
        rows = slice(segment.token_begin, segment.token_end)
        output[rows] = _attend_segment(context, segment, layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], scoring)
    for group in context.decode:
        output.index_copy_(0, group.rows, _attend_group(context, group, layer, query[0], scoring))
    return output.unsqueeze(0), None


transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _write(context: AttentionContext, kernels: NativeLibrary | None, layer: int, key: Tensor, value: Tensor) -> None:
    """Writes K and V of all tokens of the step, each [num_tokens, num_kv_heads, head_dim]."""
    cache = context.cache
    if cache.layout.dtype != "int8":
        cache.write(layer, context.slot_mapping, key, value)
        return
    if kernels is None:
        raise NotInKernelsError
    key, value = key.contiguous(), value.contiguous()
    slots = context.slot_mapping
    kernels.write_kv(_kv_layer(cache, layer), len(slots), slots.data_ptr(), key.data_ptr(), value.data_ptr())


def _kv_layer(cache: PagedKVCache, layer: int) -> KVLayer:
    keys_address, values_address = cache.layer_addresses(layer)
    return KVLayer(
        keys=keys_address,
        values=values_address,
        dtype=KV_DTYPES[cache.layout.dtype],
        block_size=cache.block_size,
        num_kv_heads=cache.layout.num_kv_heads,
        head_dim=cache.layout.head_dim,
    )


def _attend_in_kernels(context: AttentionContext, kernels: NativeLibrary, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
    """Attention of all tokens of the step, straight from the pool: [num_tokens, num_heads, head_dim]."""
    cache = context.cache
    _, num_heads, head_dim = query.shape
    plan = context.plan(num_heads // cache.layout.num_kv_heads)
    queries = query.contiguous()
    output = torch.empty_like(queries)
    call = AttentionCall(
        segments=plan.segments.ctypes.data,
        tiles=plan.tiles.ctypes.data,
        num_tiles=len(plan.tiles),
        queries=queries.data_ptr(),
        query_stride=num_heads * head_dim,
        num_heads=num_heads,
        scale=scoring.scale,
        window=scoring.window or 0,
        out=output.data_ptr(),
    )
    kernels.attend(call, _kv_layer(cache, layer))
    return output


def _attend_segment(
    context: AttentionContext, segment: PrefillSegment, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of one prompt chunk: [num_tokens, num_heads, head_dim]."""
    view = segment.view(scoring.window)
    if view.block_ids is not None:
        keys, values = context.cache.gather(layer, view.block_ids)  # [num_blocks * block_size, num_kv_heads, head_dim]
        key = keys[: view.num_keys].to(query.dtype).transpose(0, 1).unsqueeze(0)
        value = values[: view.num_keys].to(query.dtype).transpose(0, 1).unsqueeze(0)
    if scoring.softcap is None and scoring.sinks is None:
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=view.mask,
            is_causal=view.mask is None,
            scale=scoring.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1)
    return _attend_segment_explicitly(query, key, value, view.mask, scoring)


def _attend_segment_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    if mask is None:
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).tril()
    grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, num_tokens, head_dim)
    num_rows = max(1, MAX_SCORE_ELEMENTS // (num_heads * num_keys))
    pieces = [
        _attend_explicitly(grouped[:, :, :, begin : begin + num_rows], key, value, mask[begin : begin + num_rows], scoring)
        for begin in range(0, num_tokens, num_rows)
    ]
    return torch.cat(pieces, dim=3).reshape(num_heads, num_tokens, head_dim).transpose(0, 1)


def _attend_group(context: AttentionContext, group: DecodeGroup, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
    """Attention of one token of each of several sequences: [num_sequences, num_heads, head_dim]."""
    view = group.view(scoring.window)
    num_sequences, num_keys = view.mask.shape
    num_heads, _, head_dim = query.shape
    keys, values = context.cache.gather(layer, view.block_ids)  # [num_sequences * num_keys, num_kv_heads, head_dim]
    # A mask does not stop a NaN that another sequence left behind this one's end.
    keys.index_fill_(0, view.unwritten, 0)
    values.index_fill_(0, view.unwritten, 0)
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    num_kv_heads = keys.shape[1]
    key = keys.view(num_sequences, num_keys, num_kv_heads, head_dim).transpose(1, 2)
    value = values.view(num_sequences, num_keys, num_kv_heads, head_dim).transpose(1, 2)
    # The heads that share keys take the place of query tokens: nothing is repeated.
    grouped = query.index_select(1, group.rows).transpose(0, 1)  # [num_sequences, num_heads, head_dim]
    grouped = grouped.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if scoring.softcap is None and scoring.sinks is None:
        mask = view.mask.view(num_sequences, 1, 1, num_keys)
        attended = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scoring.scale)
    else:
        mask = view.mask.view(num_sequences, 1, 1, 1, num_keys)
        attended = _attend_explicitly(grouped.unsqueeze(3), key, value, mask, scoring)
    return attended.reshape(num_sequences, num_heads, head_dim)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention with the scores made in full, for what the fused kernel cannot do.

    Args:
        query: [batch, num_kv_heads, num_groups, num_tokens, head_dim].
        key: [batch, num_kv_heads, num_keys, head_dim].
        value: same as key.
        mask: bool, broadcast to [batch, num_kv_heads, num_groups, num_tokens, num_keys].
        scoring: scale, soft cap and sinks.

    Returns:
        Same shape as query.
    """
    scores = (query @ key.unsqueeze(2).transpose(-1, -2)).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view(1, query.shape[1], query.shape[2], 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(value.dtype) @ value.unsqueeze(2)
