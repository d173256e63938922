"""Weights as the kernels read them: panels of 16 output columns, in float32, or in int8 with a scale for each 64 inputs.

int8 is symmetric and rounds to nearest: w ~ scale * q over 64 consecutive inputs of one output, with the scale that loses least
among those by which sums of four products fit into 16 bits, for that is how processors without VNNI are fast. Rows of activations
get 8 bits when they arrive. The scheme is that of GGUF's Q8_0, with longer blocks.
"""

import mmap
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kvrelay.engine.native.library import GROUP, MATRIX_F32, MATRIX_INT8, PANEL, Matrix, NativeLibrary

_ALIGNMENT = 64


@dataclass(slots=True)
class WeightArena:
    """Memory for packed weights, in large pages where the system has them: a decode step walks through all of it.

    Args:
        num_bytes: of the next region; further ones are made when it is full.
    """

    num_bytes: int
    _regions: list[tuple[mmap.mmap, Tensor]] = field(default_factory=list)
    _used_bytes: int = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The same tensor, contiguous, in the arena."""
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor in the arena, whose memory was never used before."""
        num_bytes = prod(shape) * dtype.itemsize
        begin = -(-self._used_bytes // _ALIGNMENT) * _ALIGNMENT
        if not self._regions or begin + num_bytes > self._regions[-1][1].numel():
            self._add_region(max(num_bytes, self.num_bytes))
            begin = 0
        self._used_bytes = begin + num_bytes
        return self._regions[-1][1][begin : self._used_bytes].view(dtype).view(shape)

    @property
    def total_bytes(self) -> int:
        """Size of all regions."""
        return sum(region.numel() for _, region in self._regions)

    def _add_region(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._regions.append((memory, torch.frombuffer(memory, dtype=torch.uint8)))


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A packed weight, and the tensors that its addresses point into."""

    matrix: Matrix
    tensors: tuple[Tensor, ...]


def pack_matrix(weight: Tensor, bias: Tensor | None, arena: WeightArena, library: NativeLibrary, *, int8: bool) -> PackedMatrix:
    """Packs y = x weight^T + bias.

    Args:
        weight: float32 [n, k].
        bias: float32 [n] or None.
        arena: where the packed weight lies.
        library: the kernels, which quantize.
        int8: quantize it; where k is no multiple of 64 it stays float32.
    """
    n, k = weight.shape
    tensors: tuple[Tensor, ...]
    if int8 and k % GROUP == 0:
        data, scales, sums = _pack_int8(weight, arena, library)
        kind = MATRIX_INT8
        tensors = (data, scales, sums)
    else:
        data = arena.copy(_pad_rows(weight).view(-1, PANEL, k).transpose(1, 2))  # [panels, k, PANEL]
        kind = MATRIX_F32
        tensors = (data,)
    padded_bias = None if bias is None else arena.copy(_pad_rows(bias.float().unsqueeze(1)).squeeze(1))
    matrix = Matrix(
        n=n,
        k=k,
        kind=kind,
        data=data.data_ptr(),
        scales=scales.data_ptr() if kind == MATRIX_INT8 else None,
        sums=sums.data_ptr() if kind == MATRIX_INT8 else None,
        bias=None if padded_bias is None else padded_bias.data_ptr(),
    )
    return PackedMatrix(matrix, tensors if padded_bias is None else (*tensors, padded_bias))


def packed_bytes(weight: Tensor, *, int8: bool) -> int:
    """Most bytes that `pack_matrix` takes for the weight, without its bias."""
    n, k = -(-weight.shape[0] // PANEL) * PANEL, weight.shape[1]
    num_bytes = n * k + n * (k // GROUP) * (4 + 2) if int8 and k % GROUP == 0 else 4 * n * k
    return num_bytes + 3 * _ALIGNMENT


def interleave_panels(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of two weights [n, k] or biases [n] in turns of 16, which a gated product reads together: [2 n, k] or [2 n].

    n must be a multiple of 16.
    """
    shape = (gate.shape[0] // PANEL, PANEL, *gate.shape[1:])
    return torch.stack((gate.view(shape), up.view(shape)), dim=1).reshape(2 * gate.shape[0], *gate.shape[1:])


def _pack_int8(weight: Tensor, arena: WeightArena, library: NativeLibrary) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [panels, k / 4, PANEL, 4]; float32 scales and int16 sums of each group, both [panels, k / GROUP, PANEL]."""
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
