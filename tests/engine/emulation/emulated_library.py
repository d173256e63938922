"""Kernels for another processor, run by an emulator in place of a `NativeLibrary`.

Each call copies what the kernel reads into the emulated process, and back what it writes.
"""

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvrelay.engine.native.library import (
    GROUP,
    KV_DTYPES,
    PANEL,
    AttentionCall,
    Decoder,
    DecoderLayer,
    DecoderStep,
    KVLayer,
    Matrix,
    MatrixKind,
    Mlp,
    RowNorm,
)

ALIGNMENT = 64
NUM_ARGUMENTS = 8
SEGMENT_ITEMS, TILE_ITEMS = 4, 3  # int64 each
NORMS = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "query_norm", "key_norm")
MATRICES = ("qkv", "output", "router")


class Emulator:
    """A process of driver.c. Places in its memory are its addresses."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._begin = int(struct.unpack("<q", self._read(8))[0])
        self._end = self._begin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def forget(self) -> None:
        self._end = self._begin

    def room(self, num_bytes: int) -> int:
        place = self._end
        self._end += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return place

    def put(self, content: bytes) -> int:
        place = self.room(len(content))
        self._send(b"W", struct.pack("<qq", place - self._begin, len(content)), content)
        return place

    def put_from(self, address: int | None, num_bytes: int) -> int | None:
        return None if address is None else self.put(ctypes.string_at(address, num_bytes))

    def fetch(self, place: int, address: int, num_bytes: int) -> None:
        self._send(b"R", struct.pack("<qq", place - self._begin, num_bytes))
        ctypes.memmove(address, self._read(num_bytes), num_bytes)

    def call(self, name: str, *arguments: int | None) -> int:
        numbers = [argument or 0 for argument in arguments] + [0] * (NUM_ARGUMENTS - len(arguments))
        self._send(b"C", struct.pack("<q", len(name)), name.encode(), struct.pack(f"<{NUM_ARGUMENTS}q", *numbers))
        (result,) = struct.unpack("<q", self._read(8))
        return int(result)

    def _send(self, *parts: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()

    def _read(self, num_bytes: int) -> bytes:
        assert self._process.stdout is not None
        answer = self._process.stdout.read(num_bytes)
        assert len(answer) == num_bytes, f"the emulator ended with {self._process.wait()}"
        return answer


class EmulatedLibrary:
    """The methods of `NativeLibrary` that tests call."""

    def __init__(self, emulator: Emulator, variant: str) -> None:
        self.variant = variant
        self._emulator = emulator

    def _call(self, name: str, *arguments: int | None) -> int:
        return self._emulator.call(f"{name}_{self.variant}", *arguments)

    def use_threads(self, num_threads: int) -> int:
        return self._emulator.call("set_threads", num_threads)

    def quantize_weights(
        self, n: int, k: int, weights_address: int, data_address: int, scales_address: int, sums_address: int
    ) -> None:
        memory = self._emulator
        memory.forget()
        num_bytes = _matrix_bytes(Matrix(n=n, k=k, kind=MatrixKind.INT8))
        addresses = (data_address, scales_address, sums_address)
        places = [memory.put(bytes(size)) for size in num_bytes]
        self._call("quantize_weights", n, k, memory.put_from(weights_address, n * k * 4), *places)
        for place, address, size in zip(places, addresses, num_bytes, strict=True):
            memory.fetch(place, address, size)

    def run_linear(self, matrix: Matrix, num_rows: int, inputs_address: int, outputs_address: int) -> None:
        memory = self._emulator
        memory.forget()
        out_bytes = num_rows * matrix.n * 4
        out, inputs = memory.room(out_bytes), memory.put_from(inputs_address, num_rows * matrix.k * 4)
        assert self._call("run_linear", memory.put(bytes(self._matrix(matrix))), num_rows, inputs, out)
        memory.fetch(out, outputs_address, out_bytes)

    def write_kv(
        self, kv: KVLayer, num_tokens: int, slots_address: int, keys_address: int, values_address: int
    ) -> None:
        memory = self._emulator
        memory.forget()
        stride = kv.num_kv_heads * kv.head_dim
        num_blocks = int(_numbers(slots_address, num_tokens).max()) // kv.block_size + 1
        theirs, side_bytes = self._kv(kv, num_blocks)
        written = [memory.put_from(address, num_tokens * stride * 4) for address in (keys_address, values_address)]
        slots = memory.put_from(slots_address, num_tokens * 8)
        self._call("write_kv", memory.put(bytes(theirs)), num_tokens, slots, *written, stride)
        memory.fetch(theirs.keys, kv.keys, side_bytes)
        memory.fetch(theirs.values, kv.values, side_bytes)

    def attend(self, call: AttentionCall, kv: KVLayer) -> None:
        memory = self._emulator
        memory.forget()
        tiles = _numbers(call.tiles, call.num_tiles * TILE_ITEMS).reshape(-1, TILE_ITEMS)
        segments = _numbers(call.segments, (int(tiles[:, 0].max()) + 1) * SEGMENT_ITEMS).reshape(-1, SEGMENT_ITEMS)
        num_rows = int((segments[:, 0] + segments[:, 1]).max())
        theirs = AttentionCall.from_buffer_copy(call)
        theirs.segments, num_blocks = self._segments(segments, kv.block_size)
        theirs.tiles = memory.put(tiles.tobytes())
        theirs.queries = memory.put_from(call.queries, num_rows * call.query_stride * 4)
        theirs.sinks = memory.put_from(call.sinks, call.num_heads * 4)
        out_bytes = num_rows * call.num_heads * kv.head_dim * 4
        theirs.out = memory.room(out_bytes)
        self._call("attend", memory.put(bytes(theirs)), memory.put(bytes(self._kv(kv, num_blocks)[0])))
        memory.fetch(theirs.out, call.out, out_bytes)

    def run_decoder(self, decoder: Decoder, step: DecoderStep, layer_begin: int, layer_end: int) -> None:
        memory = self._emulator
        memory.forget()
        theirs = self._step(step)
        row_bytes = _kv_row_bytes(step.kv_dtype, decoder.head_dim)
        pool_bytes = 2 * decoder.num_layers * step.num_blocks * step.block_size * decoder.num_kv_heads * row_bytes
        logits_bytes = step.num_logits * decoder.lm_head.n * 4
        theirs.pool = memory.put_from(step.pool, pool_bytes)
        theirs.logits = memory.room(logits_bytes)
        places = memory.put(self._decoder(decoder, step)), memory.put(bytes(theirs))
        assert self._call("run_decoder", *places, layer_begin, layer_end)
        memory.fetch(theirs.pool, step.pool, pool_bytes)
        memory.fetch(theirs.logits, step.logits, logits_bytes)

    def _matrix(self, matrix: Matrix) -> Matrix:
        theirs = Matrix.from_buffer_copy(matrix)
        sizes = _matrix_bytes(matrix)
        theirs.data, theirs.scales, theirs.sums = map(
            self._emulator.put_from, (matrix.data, matrix.scales, matrix.sums), sizes
        )
        theirs.bias = self._emulator.put_from(matrix.bias, matrix.n * 4)
        return theirs

    def _norm(self, norm: RowNorm) -> RowNorm:
        theirs = RowNorm.from_buffer_copy(norm)
        theirs.weight = self._emulator.put_from(norm.weight, norm.width * 4)
        theirs.bias = self._emulator.put_from(norm.bias, norm.width * 4)
        return theirs

    def _kv(self, kv: KVLayer, num_blocks: int) -> tuple[KVLayer, int]:
        side_bytes = num_blocks * kv.block_size * kv.num_kv_heads * _kv_row_bytes(kv.dtype, kv.head_dim)
        theirs = KVLayer.from_buffer_copy(kv)
        theirs.keys = self._emulator.put_from(kv.keys, side_bytes)
        theirs.values = self._emulator.put_from(kv.values, side_bytes)
        return theirs, side_bytes

    def _segments(self, segments: NDArray[np.int64], block_size: int) -> tuple[int, int]:
        """Where they lie, and how many blocks of the pool they use."""
        theirs, num_blocks = segments.copy(), 0
        for row, (_, num_rows, position, address) in enumerate(segments.tolist()):
            table = _numbers(address, -(-(position + num_rows) // block_size))
            num_blocks = max(num_blocks, int(table.max()) + 1)
            theirs[row, 3] = self._emulator.put(table.tobytes())
        return self._emulator.put(theirs.tobytes()), num_blocks

    def _step(self, step: DecoderStep) -> DecoderStep:
        put_from = self._emulator.put_from
        theirs = DecoderStep.from_buffer_copy(step)
        for name in ("token_ids", "positions", "slots"):
            setattr(theirs, name, put_from(getattr(step, name), step.num_tokens * 8))
        theirs.tiles = put_from(step.tiles, step.num_tiles * TILE_ITEMS * 8)
        theirs.logit_rows = put_from(step.logit_rows, step.num_logits * 8)
        segments = _numbers(step.segments, step.num_segments * SEGMENT_ITEMS).reshape(-1, SEGMENT_ITEMS)
        theirs.segments, _ = self._segments(segments, step.block_size)
        return theirs

    def _decoder(self, decoder: Decoder, step: DecoderStep) -> bytes:
        put_from = self._emulator.put_from
        num_positions = int(_numbers(step.positions, step.num_tokens).max()) + 1
        num_ids = int(_numbers(step.token_ids, step.num_tokens).max()) + 1
        theirs = Decoder.from_buffer_copy(decoder)
        for name in ("cosines", "sines"):
            for rope, address in enumerate(getattr(decoder, name)):
                getattr(theirs, name)[rope] = put_from(address, num_positions * decoder.rotary_dim // 2 * 4)
        theirs.embeddings = put_from(decoder.embeddings, num_ids * decoder.hidden * 4)
        theirs.narrow_embeddings = put_from(decoder.narrow_embeddings, num_ids * decoder.hidden * 2)
        theirs.position_embeddings = put_from(decoder.position_embeddings, num_positions * decoder.hidden * 4)
        layers = (DecoderLayer * decoder.num_layers)(
            *(self._layer(decoder.layers[number], decoder.num_heads) for number in range(decoder.num_layers))
        )
        theirs.layers = ctypes.cast(self._emulator.put(bytes(layers)), ctypes.POINTER(DecoderLayer))
        theirs.final_norm = self._norm(decoder.final_norm)
        theirs.lm_head, theirs.token_rows = self._matrix(decoder.lm_head), self._matrix(decoder.token_rows)
        return bytes(theirs)

    def _layer(self, layer: DecoderLayer, num_heads: int) -> DecoderLayer:
        theirs = DecoderLayer.from_buffer_copy(layer)
        for name in NORMS:
            setattr(theirs, name, self._norm(getattr(layer, name)))
        for name in MATRICES:
            setattr(theirs, name, self._matrix(getattr(layer, name)))
        theirs.sinks = self._emulator.put_from(layer.sinks, num_heads * 4)
        experts = [layer.experts[number] for number in range(layer.num_experts)]
        mlps = (Mlp * len(experts))(*(Mlp(self._matrix(expert.up), self._matrix(expert.down)) for expert in experts))
        theirs.experts = ctypes.cast(self._emulator.put(bytes(mlps)), ctypes.POINTER(Mlp))
        return theirs


def _numbers(address: int, count: int) -> NDArray[np.int64]:
    return np.frombuffer(ctypes.string_at(address, count * 8), dtype=np.int64)


def _matrix_bytes(matrix: Matrix) -> tuple[int, int, int]:
    """Of data, scales and sums."""
    n, k = -(-matrix.n // PANEL) * PANEL, matrix.k
    width = {MatrixKind.F32: 4, MatrixKind.INT8: 1}.get(matrix.kind, 2)
    return n * k * width, n * k // GROUP * 4, n * k // GROUP * 2


def _kv_row_bytes(dtype: int, head_dim: int) -> int:
    return {KV_DTYPES["float32"]: 4 * head_dim, KV_DTYPES["bfloat16"]: 2 * head_dim, KV_DTYPES["int8"]: head_dim + 4}[
        dtype
    ]
