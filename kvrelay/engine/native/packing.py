"""Packs weights for the kernels: panels of 16 output columns, in their type, or int8 with scales.

int8 is GGUF's Q8_0 with longer blocks: w ~ scale * q over 64 inputs of one output. Sums of four
products fit into 16 bits, because processors without VNNI are fast only then.
"""

import mmap
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kvrelay.engine.native.library import (
    BF16_STEP,
    GROUP,
    MATRIX_BF16,
    MATRIX_BF16_PLAIN,
    MATRIX_F32,
    MATRIX_INT8,
    PANEL,
    Matrix,
    NativeLibrary,
)

_ALIGNMENT = 64


@dataclass(slots=True)
class WeightArena:
    """Memory in regions of `num_bytes`, in large pages because a decode step reads all of it."""

    num_bytes: int
    _regions: list[tuple[mmap.mmap, Tensor]] = field(default_factory=list)
    _used_bytes: int = 0

    def copy(self, tensor: Tensor) -> Tensor:
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

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
    weight: Tensor,
    bias: Tensor | None,
    arena: WeightArena,
    library: NativeLibrary,
    *,
    int8: bool,
    plain_rows: bool = False,
) -> PackedMatrix:
    """weight: float32 or bfloat16 [n, k]; bias: [n].

    Becomes float32 where k is no multiple of 64 for int8, or of 32 for bfloat16. plain_rows: inputs
    are rounded to bfloat16, too.
    """
    n, k = weight.shape
    scales = sums = None
    if int8 and k % GROUP == 0:
        kind = MATRIX_INT8
        data, scales, sums = _pack_int8(weight, arena, library)
    elif _stays_bfloat16(weight.dtype, k):
        kind = MATRIX_BF16_PLAIN if plain_rows else MATRIX_BF16
        # [panels, k / 2, PANEL, 2]
        data = arena.copy(_pad_rows(weight).view(-1, PANEL, k // 2, 2).transpose(1, 2))
    else:
        kind = MATRIX_F32
        # [panels, k, PANEL]
        data = arena.copy(_pad_rows(weight.float()).view(-1, PANEL, k).transpose(1, 2))
    padded_bias = None if bias is None else arena.copy(_pad_rows(bias.float().unsqueeze(1)).squeeze(1))
    tensors = [tensor for tensor in (data, scales, sums, padded_bias) if tensor is not None]
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (data, scales, sums, padded_bias)]
    return PackedMatrix(Matrix(n, k, kind, *addresses), tuple(tensors))


def packed_bytes(n: int, k: int, dtype: torch.dtype, *, has_bias: bool, int8: bool) -> int:
    """An upper bound."""
    num_columns = -(-n // PANEL) * PANEL
    bias_bytes = 4 * num_columns + _ALIGNMENT if has_bias else 0
    if int8 and k % GROUP == 0:
        return num_columns * k + num_columns * (k // GROUP) * (4 + 2) + 3 * _ALIGNMENT + bias_bytes
    return (2 if _stays_bfloat16(dtype, k) else 4) * num_columns * k + 2 * _ALIGNMENT + bias_bytes


def _stays_bfloat16(dtype: torch.dtype, k: int) -> bool:
    return dtype == torch.bfloat16 and k % BF16_STEP == 0


def interleave_panels(gate: Tensor, up: Tensor) -> Tensor:
    """Interleaves [n, ...] by 16 rows to [2 n, ...]; n is a multiple of 16."""
    shape = (gate.shape[0] // PANEL, PANEL, *gate.shape[1:])
    return torch.stack((gate.view(shape), up.view(shape)), dim=1).reshape(2 * gate.shape[0], *gate.shape[1:])


def _pack_int8(weight: Tensor, arena: WeightArena, library: NativeLibrary) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    num_panels = -(-n // PANEL)
    data = arena.zeros(num_panels, k // 4, PANEL, 4, dtype=torch.int8)
    scales = arena.zeros(num_panels, k // GROUP, PANEL, dtype=torch.float32)
    sums = arena.zeros(num_panels, k // GROUP, PANEL, dtype=torch.int16)
    weight = weight.contiguous()
    library.quantize_weights(n, k, weight.data_ptr(), data.data_ptr(), scales.data_ptr(), sums.data_ptr())
    return data, scales, sums


def _pad_rows(weight: Tensor) -> Tensor:
    missing = -weight.shape[0] % PANEL
    return weight if missing == 0 else torch.nn.functional.pad(weight, (0, 0, 0, missing))
