"""Runs whole decoders in compiled kernels, by one call per step.

A row gives the same bits alone and in a batch, in a prompt and token by token.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvrelay.engine.decoder_weights import CONV1D, DecoderWeights, LayerWeights, Linear, Norm, is_experts
from kvrelay.engine.kernel_batch import KernelBatch, Numbers
from kvrelay.engine.native.library import (
    BF16_STEP,
    KV_DTYPES,
    Decoder,
    DecoderLayer,
    DecoderStep,
    Matrix,
    MatrixKind,
    Mlp,
    NativeLibrary,
    RowNorm,
)
from kvrelay.engine.native.packing import WeightArena, pack_matrix, packed_bytes
from kvrelay.engine.paged_kv_cache import PagedKVCache

NOTIFY_BYTES = 1024 * 1024  # KV after which the sender is notified; its messages are about as large


class NativeDecoder:
    """Made by `pack`; used by one thread.

    Args:
        decoder: its addresses point into `kept`, `arena` and `layers`.
    """

    def __init__(
        self,
        library: NativeLibrary,
        decoder: Decoder,
        kept: list[object],
        arena: WeightArena,
        layers: "ctypes.Array[DecoderLayer]",
        weights: DecoderWeights,
    ) -> None:
        self._library = library
        self._decoder = decoder
        self._kept = kept
        self._arena = arena
        self._layers = layers
        self._vocab_size = weights.head.shape[0]
        positions = weights.position_embeddings
        self._max_positions = None if positions is None else len(positions)
        self._ropes = weights.ropes
        self._angles: list[tuple[Tensor, Tensor]] = []
        self._num_angles = 0

    @property
    def weight_bytes(self) -> int:
        return self._arena.total_bytes

    @property
    def has_own_embeddings(self) -> bool:
        return self._decoder.embeddings is None

    @contextmanager
    def comparable(self, shortened: Mapping[int, int]) -> Iterator[None]:
        """With other windows, and with all experts for each token."""
        before = [(layer.window, layer.experts_per_token) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.window = shortened.get(layer.window, layer.window)
                layer.experts_per_token = layer.num_experts
            yield
        finally:
            for layer, (window, experts_per_token) in zip(self._layers, before, strict=True):
                layer.window, layer.experts_per_token = window, experts_per_token

    def run(
        self, batch: KernelBatch, cache: PagedKVCache, on_layer_written: Callable[[int], None] | None = None
    ) -> Tensor:
        assert self._max_positions is None or batch.num_positions <= self._max_positions, (
            "a token behind the last position"
        )
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
        if num_positions <= self._num_angles:
            return
        self._num_angles = max(num_positions, 2 * self._num_angles, 1024)
        self._angles = [rope(self._num_angles) for rope in self._ropes]
        for number, (cosines, sines) in enumerate(self._angles):
            self._decoder.cosines[number] = cosines.data_ptr()
            self._decoder.sines[number] = sines.data_ptr()


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


def pack(weights: DecoderWeights, library: NativeLibrary, kind: MatrixKind) -> NativeDecoder:
    """Takes the weights from their module, layer by layer: no two copies of all exist."""
    return _Packing(library, weights, kind).decoder()


class _Packing:
    def __init__(self, library: NativeLibrary, weights: DecoderWeights, kind: MatrixKind) -> None:
        self._library = library
        self._weights = weights
        self._kind = kind
        embeddings = weights.embeddings
        is_bfloat16 = kind in (MatrixKind.BF16, MatrixKind.BF16_PLAIN) and embeddings.dtype == torch.bfloat16
        self._packs_embeddings = is_bfloat16 and embeddings.shape[1] % BF16_STEP == 0
        self._shares_head = embeddings.data_ptr() == weights.head.parts[0].data_ptr()
        num_bytes = self._packed_bytes(weights.head)
        if self._packs_embeddings and not self._shares_head:
            num_bytes += self._packed_bytes(Linear((embeddings,)))
        self._intermediate = 0
        for layer in map(weights.layer, range(weights.num_layers)):
            num_bytes += sum(map(self._packed_bytes, layer.linears))
            if layer.router is not None:
                num_bytes += packed_bytes(*layer.router.shape, torch.float32, MatrixKind.F32, has_bias=True)
            self._intermediate = max(self._intermediate, layer.experts[0].down.shape[1])
        self._arena = WeightArena(num_bytes)
        self._kept: list[object] = []

    def _packed_bytes(self, linear: Linear) -> int:
        return packed_bytes(*linear.shape, linear.dtype, self._kind, has_bias=bool(linear.biases))

    def decoder(self) -> NativeDecoder:
        weights = self._weights
        layers = (DecoderLayer * weights.num_layers)(*map(self._take_layer, range(weights.num_layers)))
        head = self._matrix(weights.head)
        has_own_rows = self._packs_embeddings and not self._shares_head
        embeddings = None if self._packs_embeddings else weights.embeddings
        # whose rows become float32 as they are read
        narrow = embeddings if weights.embeddings.dtype == torch.bfloat16 else None
        decoder = Decoder(
            num_layers=len(layers),
            hidden=weights.embeddings.shape[1],
            intermediate=self._intermediate,
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            rotary_dim=max((2 * rope(1)[0].shape[1] for rope in weights.ropes), default=0),
            embeddings=self._keep(embeddings) if narrow is None else None,
            narrow_embeddings=None if narrow is None else self._keep_as_it_is(narrow),
            position_embeddings=self._keep(weights.position_embeddings),
            embedding_scale=weights.embedding_scale,
            layers=ctypes.cast(layers, ctypes.POINTER(DecoderLayer)),
            final_norm=self._norm(weights.final_norm),
            lm_head=head,
            token_rows=self._matrix(Linear((weights.embeddings,))) if has_own_rows else head,
        )
        return NativeDecoder(self._library, decoder, self._kept, self._arena, layers, weights)

    def _take_layer(self, number: int) -> DecoderLayer:
        layer = self._weights.layer(number)
        packed = self._layer(layer)
        release_weights(layer.module, embeddings=False)
        return packed

    def _layer(self, layer: LayerWeights) -> DecoderLayer:
        experts = (Mlp * len(layer.experts))(
            *(Mlp(self._matrix(expert.up), self._matrix(expert.down)) for expert in layer.experts)
        )
        self._kept.append(experts)
        return DecoderLayer(
            **{name: self._norm(norm) for name, norm in layer.norms.items()},
            qkv=self._matrix(layer.qkv),
            output=self._matrix(layer.output),
            # float32, because a choice is all or nothing
            router=Matrix() if layer.router is None else self._packed(layer.router, MatrixKind.F32),
            experts=ctypes.cast(experts, ctypes.POINTER(Mlp)),
            num_experts=len(experts),
            experts_per_token=layer.experts_per_token,
            shares_of_chosen=layer.shares_of_chosen,
            up_mode=self._weights.up_mode,
            window=layer.window,
            rope=layer.rope,
            sinks=self._keep(layer.sinks),
            attention_scale=layer.attention_scale,
        )

    def _matrix(self, linear: Linear) -> Matrix:
        return self._packed(linear, self._kind)

    def _packed(self, linear: Linear, kind: MatrixKind) -> Matrix:
        packed = pack_matrix(linear.weight(), linear.bias(), self._arena, self._library, kind)
        self._kept.append(packed)
        return packed.matrix

    def _norm(self, norm: Norm) -> RowNorm:
        weight, bias = self._keep(norm.weight), self._keep(norm.bias)
        return RowNorm(weight=weight, bias=bias, width=len(norm.weight), epsilon=norm.epsilon)

    def _keep(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self._keep_as_it_is(tensor.float())

    def _keep_as_it_is(self, tensor: Tensor) -> int:
        contiguous = tensor.contiguous()
        self._kept.append(contiguous)
        return contiguous.data_ptr()


def release_weights(module: Any, *, embeddings: bool) -> None:
    """Frees what the decoder has copied."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, CONV1D)) or (embeddings and isinstance(part, nn.Embedding)):
            part.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        elif is_experts(part):
            for name, weight in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(weight.new_empty(0), requires_grad=False))
