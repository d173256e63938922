"""Linear layers of torch models on compiled kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kvrelay.engine.native.library import MatrixKind, NativeLibrary
from kvrelay.engine.native.packing import PackedMatrix, WeightArena, pack_matrix, packed_bytes


class PackedLinear(nn.Module):
    """Computes y = x W^T + bias for float32 x [..., k]."""

    def __init__(self, library: NativeLibrary, packed: PackedMatrix) -> None:
        super().__init__()
        self._library = library
        self._packed = packed

    def forward(self, inputs: Tensor) -> Tensor:
        matrix = self._packed.matrix
        rows = inputs.reshape(-1, matrix.k).contiguous()
        outputs = torch.empty(rows.shape[0], matrix.n)
        self._library.run_linear(matrix, rows.shape[0], rows.data_ptr(), outputs.data_ptr())
        return outputs.view(*inputs.shape[:-1], matrix.n)


def pack_linears(module: Any, library: NativeLibrary, kind: MatrixKind) -> int:
    """Replaces all linear layers, one after the other; returns the packed bytes."""
    linears = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    arena = WeightArena(sum(_packed_bytes(part, kind) for _, part in linears))
    while linears:
        name, part = linears.pop()
        bias = None if part.bias is None else part.bias.detach()
        packed = pack_matrix(_weight(part), bias, arena, library, kind)
        module.set_submodule(name, PackedLinear(library, packed))
    return arena.total_bytes


def _packed_bytes(part: Any, kind: MatrixKind) -> int:
    n, k = _weight(part).shape
    return packed_bytes(n, k, part.weight.dtype, kind, has_bias=part.bias is not None)


def _weight(part: Any) -> Tensor:
    """[n, k]. GPT-2's Conv1D has it transposed."""
    weight: Tensor = part.weight.detach()
    return weight.t() if isinstance(part, Conv1D) else weight
