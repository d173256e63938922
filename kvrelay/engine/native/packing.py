"""Packs weights for the kernels: panels of 16 output columns, in their type, or int8 with scales.

int8 is GGUF's Q8_0 with longer blocks: w ~ scale * q over 64 inputs of one output. Sums of four
products fit into 16 bits, because processors without VNNI are fast only then.
"""

import mmap
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kvrelay.engine.mapped_weights import pages_in_use
from kvrelay.engine.native.library import BF16_STEP, GROUP, PANEL, Matrix, MatrixKind, NativeLibrary

_ALIGNMENT = 64
_ROWS_AT_ONCE = 1024  # of a weight, a multiple of PANEL


@dataclass(slots=True)
class WeightArena:
    """Memory in regions of `num_bytes`, in large pages because a decode step reads all of it."""

    num_bytes: int
    _regions: list[tuple[mmap.mmap, Tensor]] = field(default_factory=list)
    _used_bytes: int = 0

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        num_bytes = prod(shape) * dtype.itemsize
        begin = -(-self._used_bytes // _ALIGNMENT) * _ALIGNMENT
        if not self._regions or begin + num_bytes > self._regions[-1][1].numel():
            self._add_region(max(num_bytes, self.num_bytes))
            begin = 0
        self._used_bytes = begin + num_bytes
        return self._regions[-1][1][begin : self._used_bytes].view(dtype).view(shape)

    @property
    def total_bytes(self) -> int:
        return sum(region.numel() for _, region in self._regions)

    def _add_region(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._regions.append((memory, torch.frombuffer(memory, dtype=torch.uint8)))


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """`tensors` keep the memory of `matrix`."""

    matrix: Matrix
    tensors: tuple[Tensor, ...]


def pack_matrix(
    weight: Tensor, bias: Tensor | None, arena: WeightArena, library: NativeLibrary, kind: MatrixKind
) -> PackedMatrix:
    """weight: float32 or bfloat16 [n, k]; bias: [n].

    Becomes float32 where k is no multiple of 64 for int8, or of 32 for bfloat16. No copy is made
    beside the packed one.
    """
    n, k = weight.shape
    kind = _kind_for(kind, weight.dtype, k)
    scales = sums = None
    if kind is MatrixKind.INT8:
        data, scales, sums = _pack_int8(weight, arena, library)
    elif kind is MatrixKind.F32:
        data = arena.zeros(num_panels(n), k, PANEL, dtype=torch.float32)
        _fill_panels(data.transpose(1, 2), weight)
    else:
        data = arena.zeros(num_panels(n), k // 2, PANEL, 2, dtype=torch.bfloat16)
        _fill_panels(data.transpose(1, 2), weight)
    padded_bias = None
    if bias is not None:
        padded_bias = arena.zeros(num_panels(n) * PANEL, dtype=torch.float32)
        padded_bias[:n] = bias
    tensors = [tensor for tensor in (data, scales, sums, padded_bias) if tensor is not None]
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (data, scales, sums, padded_bias)]
    return PackedMatrix(Matrix(n, k, kind, *addresses), tuple(tensors))


def packed_bytes(n: int, k: int, dtype: torch.dtype, kind: MatrixKind, *, has_bias: bool) -> int:
    """An upper bound."""
    kind, num_columns = _kind_for(kind, dtype, k), num_panels(n) * PANEL
    bias_bytes = 4 * num_columns + _ALIGNMENT if has_bias else 0
    if kind is MatrixKind.INT8:
        return num_columns * k + num_columns * (k // GROUP) * (4 + 2) + 3 * _ALIGNMENT + bias_bytes
    return (4 if kind is MatrixKind.F32 else 2) * num_columns * k + _ALIGNMENT + bias_bytes


def num_panels(num_columns: int) -> int:
    return -(-num_columns // PANEL)


def _kind_for(kind: MatrixKind, dtype: torch.dtype, k: int) -> MatrixKind:
    if kind is MatrixKind.F32:
        return kind
    if kind is MatrixKind.INT8:
        return kind if k % GROUP == 0 else MatrixKind.F32
    return kind if dtype == torch.bfloat16 and k % BF16_STEP == 0 else MatrixKind.F32


def _fill_panels(panels: Tensor, weight: Tensor) -> None:
    """panels: zeros [num_panels, PANEL, ...]; weight: [n, k]."""
    for begin in range(0, len(weight), _ROWS_AT_ONCE):
        rows = weight[begin : begin + _ROWS_AT_ONCE]
        num_whole, rest = divmod(len(rows), PANEL)
        to, whole, shape = panels[begin // PANEL :], num_whole * PANEL, panels.shape[1:]
        to[:num_whole].copy_(rows[:whole].view(num_whole, *shape))
        if rest > 0:
            to[num_whole, :rest].copy_(rows[whole:].view(rest, *shape[1:]))
        pages_in_use.count(rows.nbytes)


def interleave_panels(gate: Tensor, up: Tensor) -> Tensor:
    """Interleaves [n, ...] by 16 rows to [2 n, ...]; n is a multiple of 16."""
    shape = (gate.shape[0] // PANEL, PANEL, *gate.shape[1:])
    return torch.stack((gate.view(shape), up.view(shape)), dim=1).reshape(2 * gate.shape[0], *gate.shape[1:])


def _pack_int8(weight: Tensor, arena: WeightArena, library: NativeLibrary) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    data = arena.zeros(num_panels(n), k // 4, PANEL, 4, dtype=torch.int8)
    scales = arena.zeros(num_panels(n), k // GROUP, PANEL, dtype=torch.float32)
    sums = arena.zeros(num_panels(n), k // GROUP, PANEL, dtype=torch.int16)
    for begin in range(0, n, _ROWS_AT_ONCE):
        rows = weight[begin : begin + _ROWS_AT_ONCE].float().contiguous()
        parts = (part[begin // PANEL :].data_ptr() for part in (data, scales, sums))
        library.quantize_weights(len(rows), k, rows.data_ptr(), *parts)
        pages_in_use.count(rows.nbytes)
    return data, scales, sums
