"""Runs llama-like decoders in compiled kernels: one call per step instead of thousands of torch's.

A row gives the same bits alone and in a batch, in a prompt and token by token.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvrelay.engine.kernel_batch import KernelBatch, Numbers
from kvrelay.engine.native.library import (
    BF16_STEP,
    KV_DTYPES,
    PANEL,
    Decoder,
    DecoderLayer,
    DecoderStep,
    NativeLibrary,
)
from kvrelay.engine.native.packing import PackedMatrix, WeightArena, interleave_panels, pack_matrix, packed_bytes
from kvrelay.engine.paged_kv_cache import PagedKVCache

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
"""Their layers are: norm, attention, add; norm, gated MLP with SiLU, add."""
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")  # angles depend on more than the position
VECTOR = 8
NOTIFY_BYTES = 1024 * 1024  # KV after which the sender is notified; its messages are about as large


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    qkv: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    # Before attention, before the MLP, of queries, of keys.
    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    window: int
    has_rope: bool


class NativeDecoder:
    """Made by `pack`; used by one thread.

    Args:
        decoder: its addresses point into `kept`, `arena` and `layers`.
        rope: num_positions -> cosines and sines, each float32 [num_positions, rotary_dim / 2].
    """

    def __init__(
        self,
        library: NativeLibrary,
        decoder: Decoder,
        kept: list[object],
        rope: Callable[[int], tuple[Tensor, Tensor]],
        arena: WeightArena,
        layers: "ctypes.Array[DecoderLayer]",
        vocab_size: int,
    ) -> None:
        self._library = library
        self._decoder = decoder
        self._kept = kept
        self._rope = rope
        self._arena = arena
        self._layers = layers
        self._vocab_size = vocab_size
        self._angles: tuple[Tensor, Tensor] = (torch.empty(0, 0), torch.empty(0, 0))

    @property
    def weight_bytes(self) -> int:
        return self._arena.total_bytes

    @property
    def has_own_embeddings(self) -> bool:
        return self._decoder.embeddings is None

    @contextmanager
    def short_windows(self, shortened: Mapping[int, int]) -> Iterator[None]:
        windows = [layer.window for layer in self._layers]
        try:
            for layer, window in zip(self._layers, windows, strict=True):
                layer.window = shortened.get(window, window)
            yield
        finally:
            for layer, window in zip(self._layers, windows, strict=True):
                layer.window = window

    def run(
        self, batch: KernelBatch, cache: PagedKVCache, on_layer_written: Callable[[int], None] | None = None
    ) -> Tensor:
        self._make_angles(batch.num_positions)
        logits = torch.empty(len(batch.logit_rows), self._vocab_size)
        step = _step(batch, batch.tiles(self._decoder.num_heads // self._decoder.num_kv_heads), cache, logits)
        num_layers = self._decoder.num_layers
        num_together = num_layers if on_layer_written is None else _layers_together(cache, len(batch.token_ids))
        for begin in range(0, num_layers, num_together):
            end = min(begin + num_together, num_layers)
            self._library.run_decoder(self._decoder, step, begin, end)
            if on_layer_written is not None:
                for layer in range(begin, end):
                    on_layer_written(layer)
        return logits

    def _make_angles(self, num_positions: int) -> None:  # doubles them, because more are cheap
        if num_positions <= self._angles[0].shape[0]:
            return
        self._angles = self._rope(max(num_positions, 2 * self._angles[0].shape[0], 1024))
        self._decoder.cosines = self._angles[0].data_ptr()
        self._decoder.sines = self._angles[1].data_ptr()


def _layers_together(cache: PagedKVCache, num_tokens: int) -> int:
    """As many as NOTIFY_BYTES: each return to Python waits for threads."""
    return max(1, round(NOTIFY_BYTES / (num_tokens * cache.layout.bytes_per_layer_token)))


def _step(batch: KernelBatch, tiles: Numbers, cache: PagedKVCache, logits: Tensor) -> DecoderStep:
    """Valid as long as its arguments live."""
    return DecoderStep(
        num_tokens=len(batch.token_ids),
        num_segments=len(batch.segments),
        num_tiles=len(tiles),
        num_logits=len(batch.logit_rows),
        token_ids=batch.token_ids.ctypes.data,
        positions=batch.positions.ctypes.data,
        slots=batch.slots.ctypes.data,
        segments=batch.segments.ctypes.data,
        tiles=tiles.ctypes.data,
        logit_rows=batch.logit_rows.ctypes.data,
        pool=cache.pool_address,
        kv_dtype=KV_DTYPES[cache.layout.dtype],
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        logits=logits.data_ptr(),
    )


def pack(
    module: Any,
    architecture: str,
    library: NativeLibrary,
    windows: Sequence[int | None],
    *,
    int8: bool,
    plain_rows: bool = False,
) -> NativeDecoder | None:
    """Packs a float32 or bfloat16 model on the CPU; None: the kernels cannot compute it.

    Args:
        windows: of each layer; the config's may not be used.
        int8: quantize weights, and activations as they come.
    """
    if not _can_pack(module, architecture):
        return None
    config = module.config
    layers = [_read_layer(layer, window) for layer, window in zip(module.model.layers, windows, strict=True)]
    head, embeddings = module.lm_head.weight, module.model.embed_tokens.weight.detach()
    packs_embeddings = embeddings.dtype == torch.bfloat16 and embeddings.shape[1] % BF16_STEP == 0
    own_rows = embeddings if packs_embeddings and embeddings.data_ptr() != head.data_ptr() else None
    arena = WeightArena(sum(packed_bytes(weight, int8=int8) for weight in _matrices(layers, head, own_rows)))
    kept: list[object] = []

    def keep(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.float().contiguous())
        return int(kept[-1].data_ptr())  # type: ignore[attr-defined]  # a tensor

    def pack(weight: tuple[Tensor, Tensor | None]) -> PackedMatrix:
        packed = pack_matrix(*weight, arena, library, int8=int8, plain_rows=plain_rows)
        kept.append(packed)
        return packed

    structures = _structures(layers, pack, keep)
    lm_head = pack((head.detach(), module.lm_head.bias)).matrix
    attention, rotary = module.model.layers[0].self_attn, module.model.rotary_emb
    decoder = Decoder(
        num_layers=len(layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        rotary_dim=2 * _rope_angles(rotary, 1)[0].shape[1],
        norm_epsilon=config.rms_norm_eps,
        attention_scale=attention.scaling,
        embeddings=None if packs_embeddings else keep(embeddings),
        layers=ctypes.cast(structures, ctypes.POINTER(DecoderLayer)),
        final_norm=keep(module.model.norm.weight.detach()),
        lm_head=lm_head,
        token_rows=lm_head if own_rows is None else pack((own_rows, None)).matrix,
    )
    kept.append(structures)
    return NativeDecoder(
        library, decoder, kept, lambda count: _rope_angles(rotary, count), arena, structures, head.shape[0]
    )


def _structures(
    layers: Sequence[_LayerWeights],
    pack: Callable[[tuple[Tensor, Tensor | None]], PackedMatrix],
    keep: Callable[[Tensor | None], int | None],
) -> "ctypes.Array[DecoderLayer]":
    structures = (DecoderLayer * len(layers))()
    for structure, layer in zip(structures, layers, strict=True):
        structure.qkv, structure.output = pack(layer.qkv).matrix, pack(layer.output).matrix
        structure.gate_up, structure.down = pack(layer.gate_up).matrix, pack(layer.down).matrix
        structure.attention_norm, structure.mlp_norm, structure.query_norm, structure.key_norm = map(keep, layer.norms)
        structure.window, structure.has_rope = layer.window, layer.has_rope
    return structures


def _matrices(layers: Sequence[_LayerWeights], *others: Tensor | None) -> list[Tensor]:
    weights = [weight for layer in layers for weight, _ in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return [*weights, *(weight for weight in others if weight is not None)]


def release_weights(module: Any, *, embeddings: bool) -> None:
    """Frees what the decoder has copied."""
    for part in module.modules():
        if isinstance(part, nn.Linear) or (embeddings and isinstance(part, nn.Embedding)):
            part.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _can_pack(module: Any, architecture: str) -> bool:
    config = module.config
    if architecture not in ARCHITECTURES or config.hidden_act != "silu":
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()) or rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return False
    attention = module.model.layers[0].self_attn
    widths = (config.hidden_size % VECTOR, attention.head_dim % PANEL, config.intermediate_size % PANEL)
    return not any(widths)


def _read_layer(layer: Any, window: int | None) -> _LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = _weight(attention.qkv_proj)
        gate_up_weight, gate_up_bias = _weight(mlp.gate_up_proj)
        gate, up = gate_up_weight.chunk(2)
        assert gate_up_bias is None, "no known model has one here"
        biases: tuple[Tensor | None, Tensor | None] = (None, None)
    else:
        parts = [_weight(attention.q_proj), _weight(attention.k_proj), _weight(attention.v_proj)]
        qkv = (torch.cat([weight for weight, _ in parts]), _joined_bias([bias for _, bias in parts]))
        (gate, gate_bias), (up, up_bias) = _weight(mlp.gate_proj), _weight(mlp.up_proj)
        biases = (gate_bias, up_bias)
    gate_up_bias = None if biases[0] is None or biases[1] is None else interleave_panels(biases[0], biases[1])
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _LayerWeights(
        qkv=qkv,
        output=_weight(attention.o_proj),
        gate_up=(interleave_panels(gate, up), gate_up_bias),
        down=_weight(mlp.down_proj),
        norms=(
            layer.input_layernorm.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            None if query_norm is None else query_norm.weight.detach(),
            None if key_norm is None else key_norm.weight.detach(),
        ),
        window=window or 0,
        has_rope=bool(getattr(attention, "use_rope", True)),
    )


def _weight(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _joined_bias(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    assert len(present) in (0, len(biases)), "queries, keys and values have biases, or none of them has"
    return torch.cat(present) if present else None


def _rope_angles(rotary: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Each float32 [num_positions, rotary_dim / 2]."""
    with torch.inference_mode():
        # [1, num_positions, rotary_dim]
        cosines, sines = rotary(torch.empty(1), torch.arange(num_positions).unsqueeze(0))
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
