"""Attention over the paged KV pool, registered with transformers under ATTENTION_NAME.

Models call `paged_attention` per layer, with the step's `AttentionMetadata` as METADATA_ARGUMENT.
No mask function is registered, so transformers builds no mask.

Covers multi-head, grouped-query (Ainslie et al. 2023) and multi-query attention (Shazeer 2019),
sliding windows (Beltagy et al. 2020), attention sinks (as in gpt_oss; Xiao et al. 2023) and
soft-capped scores (Gemma 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as functional
from torch import Tensor

from kvrelay.engine.attention_metadata import AttentionMetadata, DecodeGroup, PrefillSegment
from kvrelay.engine.fast_transformers_import import transformers
from kvrelay.engine.native.library import KV_DTYPES, PANEL, AttentionCall, KVLayer, NativeLibrary
from kvrelay.engine.paged_kv_cache import PagedKVCache

ATTENTION_NAME = "kvrelay_paged"
METADATA_ARGUMENT = "kvrelay_metadata"
# Elements of a full attention matrix; longer chunks are attended to in pieces.
MAX_SCORE_ELEMENTS = 16 * 1024 * 1024


class AttentionMetadataMissingError(Exception):
    """The model did not pass the metadata on."""


class NotInKernelsError(Exception):
    """KV is in int8, and the kernels cannot compute this attention."""


@dataclass(frozen=True, slots=True)
class Scoring:
    scale: float
    softcap: float | None
    sinks: Tensor | None  # [num_heads]; logits in the softmax that have no value
    window: int | None


@runtime_checkable
class AttentionObserver(Protocol):
    """Replaces the metadata while a model is probed: sees calls, computes nothing."""

    def observe(self, module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        """Arguments as of `paged_attention`."""


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
        query: [1, num_heads, num_tokens, head_dim].
        key, value: [1, num_kv_heads, num_tokens, head_dim].
        scaling: of the scores; None: head_dim ** -0.5.
        arguments: METADATA_ARGUMENT; `sliding_window`, `softcap`, `s_aux` of some models.

    Returns:
        [1, num_tokens, num_heads, head_dim] and no weights.

    Raises:
        AttentionMetadataMissingError, NotInKernelsError: while a model is loaded.
    """
    metadata = arguments.get(METADATA_ARGUMENT)
    if not isinstance(metadata, AttentionMetadata):
        if not isinstance(metadata, AttentionObserver):
            raise AttentionMetadataMissingError
        metadata.observe(module, query, key, value, arguments)
        return torch.zeros_like(query).transpose(1, 2), None
    layer: int = module.layer_idx
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux"),
        window=window_of(module, arguments),
    )
    is_plain = scoring.softcap is None and query.shape[3] % PANEL == 0
    kernels = metadata.kernels if is_plain else None
    _write(metadata, kernels, layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if metadata.on_layer_written is not None:
        metadata.on_layer_written(layer)
    if kernels is not None:
        return _attend_in_kernels(metadata, kernels, layer, query[0].transpose(0, 1), scoring).unsqueeze(0), None
    # [num_tokens, num_heads, head_dim]
    output = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for segment in metadata.prefill:
        rows = slice(segment.token_begin, segment.token_end)
        output[rows] = _attend_segment(
            metadata, segment, layer, query[:, :, rows], key[:, :, rows], value[:, :, rows], scoring
        )
    for group in metadata.decode:
        output.index_copy_(0, group.rows, _attend_group(metadata, group, layer, query[0], scoring))
    return output.unsqueeze(0), None


def window_of(module: Any, arguments: Mapping[str, Any]) -> int | None:
    """Not from the config, which may have a `sliding_window` that the architecture ignores."""
    window: int | None = (
        arguments["sliding_window"] if "sliding_window" in arguments else getattr(module, "sliding_window", None)
    )
    return window


transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)


def _write(metadata: AttentionMetadata, kernels: NativeLibrary | None, layer: int, key: Tensor, value: Tensor) -> None:
    """key, value: [num_tokens, num_kv_heads, head_dim]."""
    cache = metadata.cache
    if cache.layout.dtype != "int8":
        cache.write(layer, metadata.slot_mapping, key, value)
        return
    if kernels is None:
        raise NotInKernelsError
    key, value = key.contiguous(), value.contiguous()
    slots = metadata.slot_mapping
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


def _attend_in_kernels(
    metadata: AttentionMetadata, kernels: NativeLibrary, layer: int, query: Tensor, scoring: Scoring
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    cache = metadata.cache
    _, num_heads, head_dim = query.shape
    batch = metadata.kernel_batch
    tiles = batch.tiles(num_heads // cache.layout.num_kv_heads)
    queries = query.contiguous()
    output = torch.empty_like(queries)
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    call = AttentionCall(
        segments=batch.segments.ctypes.data,
        tiles=tiles.ctypes.data,
        num_tiles=len(tiles),
        queries=queries.data_ptr(),
        query_stride=num_heads * head_dim,
        num_heads=num_heads,
        scale=scoring.scale,
        num_parts=metadata.num_parts,
        window=scoring.window or 0,
        sinks=None if sinks is None else sinks.data_ptr(),
        out=output.data_ptr(),
    )
    kernels.attend(call, _kv_layer(cache, layer))
    return output


def _attend_segment(
    metadata: AttentionMetadata,
    segment: PrefillSegment,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
) -> Tensor:  # [num_tokens, num_heads, head_dim]
    view = segment.view(scoring.window)
    if view.block_ids is not None:
        # [num_blocks * block_size, num_kv_heads, head_dim]
        keys, values = metadata.cache.gather(layer, view.block_ids)
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


def _attend_segment_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    if mask is None:
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).tril()
    grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, num_tokens, head_dim)
    num_rows = max(1, MAX_SCORE_ELEMENTS // (num_heads * num_keys))
    pieces = [
        _attend_explicitly(
            grouped[:, :, :, begin : begin + num_rows], key, value, mask[begin : begin + num_rows], scoring
        )
        for begin in range(0, num_tokens, num_rows)
    ]
    return torch.cat(pieces, dim=3).reshape(num_heads, num_tokens, head_dim).transpose(0, 1)


def _attend_group(
    metadata: AttentionMetadata, group: DecodeGroup, layer: int, query: Tensor, scoring: Scoring
) -> Tensor:  # [num_sequences, num_heads, head_dim]
    view = group.view(scoring.window)
    num_sequences, num_keys = view.mask.shape
    num_heads, _, head_dim = query.shape
    # [num_sequences * num_keys, num_kv_heads, head_dim]
    keys, values = metadata.cache.gather(layer, view.block_ids)
    # A mask does not stop a stale NaN behind the sequence's end.
    keys.index_fill_(0, view.unwritten, 0)
    values.index_fill_(0, view.unwritten, 0)
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    num_kv_heads = keys.shape[1]
    key = keys.view(num_sequences, num_keys, num_kv_heads, head_dim).transpose(1, 2)
    value = values.view(num_sequences, num_keys, num_kv_heads, head_dim).transpose(1, 2)
    # Heads that share keys take the place of query tokens: no key is repeated.
    # [num_sequences, num_heads, head_dim]
    grouped = query.index_select(1, group.rows).transpose(0, 1)
    grouped = grouped.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if scoring.softcap is None and scoring.sinks is None:
        mask = view.mask.view(num_sequences, 1, 1, num_keys)
        attended = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scoring.scale)
    else:
        mask = view.mask.view(num_sequences, 1, 1, 1, num_keys)
        attended = _attend_explicitly(grouped.unsqueeze(3), key, value, mask, scoring)
    return attended.reshape(num_sequences, num_heads, head_dim)


def _attend_explicitly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Makes all scores, for what the fused kernel cannot do.

    Args:
        query: [batch, num_kv_heads, num_groups, num_tokens, head_dim]; so is the result.
        key, value: [batch, num_kv_heads, num_keys, head_dim].
        mask: bool, broadcast to the scores.
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
