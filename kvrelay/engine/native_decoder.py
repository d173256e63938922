"""Runs whole decoders in compiled kernels: one call per step instead of thousands of torch's.

A row gives the same bits alone and in a batch, in a prompt and token by token.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvrelay.engine.decoder_weights import CONV1D, DecoderWeights, LayerWeights, Linear, Norm, read_decoder
from kvrelay.engine.kernel_batch import KernelBatch, Numbers
from kvrelay.engine.native.library import (
    BF16_STEP,
    KV_DTYPES,
    Decoder,
    DecoderLayer,
    DecoderStep,
    Matrix,
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
        self._vocab_size = weights.head.weight.shape[0]
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
    weights = read_decoder(module, architecture, windows)
    return None if weights is None else _Packing(library, weights, int8=int8, plain_rows=plain_rows).decoder()


class _Packing:
    def __init__(self, library: NativeLibrary, weights: DecoderWeights, *, int8: bool, plain_rows: bool) -> None:
        self._library = library
        self._weights = weights
        self._int8, self._plain_rows = int8, plain_rows
        embeddings = weights.embeddings
        self._packs_embeddings = embeddings.dtype == torch.bfloat16 and embeddings.shape[1] % BF16_STEP == 0
        self._shares_head = embeddings.data_ptr() == weights.head.weight.data_ptr()
        packed = [linear.weight for layer in weights.layers for linear in layer.linears.values()]
        packed += [weights.head.weight] if self._shares_head or not self._packs_embeddings else [embeddings] * 2
        self._arena = WeightArena(sum(packed_bytes(weight, int8=int8) for weight in packed))
        self._kept: list[object] = []

    def decoder(self) -> NativeDecoder:
        weights = self._weights
        layers = (DecoderLayer * len(weights.layers))(*map(self._layer, weights.layers))
        head = self._matrix(weights.head)
        has_own_rows = self._packs_embeddings and not self._shares_head
        decoder = Decoder(
            num_layers=len(layers),
            hidden=weights.embeddings.shape[1],
            intermediate=weights.layers[0].down.weight.shape[1],
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            rotary_dim=max((2 * rope(1)[0].shape[1] for rope in weights.ropes), default=0),
            embeddings=None if self._packs_embeddings else self._keep(weights.embeddings),
            position_embeddings=self._keep(weights.position_embeddings),
            embedding_scale=weights.embedding_scale,
            layers=ctypes.cast(layers, ctypes.POINTER(DecoderLayer)),
            final_norm=self._norm(weights.final_norm),
            lm_head=head,
            token_rows=self._matrix(Linear(weights.embeddings, None)) if has_own_rows else head,
        )
        return NativeDecoder(self._library, decoder, self._kept, self._arena, layers, weights)

    def _layer(self, layer: LayerWeights) -> DecoderLayer:
        return DecoderLayer(
            **{name: self._matrix(linear) for name, linear in layer.linears.items()},
            **{name: self._norm(norm) for name, norm in layer.norms.items()},
            up_mode=self._weights.up_mode,
            window=layer.window,
            rope=layer.rope,
            attention_scale=layer.attention_scale,
        )

    def _matrix(self, linear: Linear) -> Matrix:
        packed = pack_matrix(
            linear.weight, linear.bias, self._arena, self._library, int8=self._int8, plain_rows=self._plain_rows
        )
        self._kept.append(packed)
        return packed.matrix

    def _norm(self, norm: Norm) -> RowNorm:
        weight, bias = self._keep(norm.weight), self._keep(norm.bias)
        return RowNorm(weight=weight, bias=bias, width=len(norm.weight), epsilon=norm.epsilon)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        contiguous = tensor.float().contiguous()
        self._kept.append(contiguous)
        return contiguous.data_ptr()


def release_weights(module: Any, *, embeddings: bool) -> None:
    """Frees what the decoder has copied."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, CONV1D)) or (embeddings and isinstance(part, nn.Embedding)):
            part.weight = nn.Parameter(torch.empty(0), requires_grad=False)
