"""Modules with bfloat16 weights that compute in float32, without all weights widened at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvrelay.engine.fast_transformers_import import transformers

_CONV1D: Any = transformers.pytorch_utils.Conv1D
_LINEAR = (nn.Linear, _CONV1D)
_ROWS_AT_ONCE = 4096  # of a weight


def widen(module: Any) -> None:
    """Makes everything float32 but linear layers and embeddings, whose outputs become float32."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(_widen_output)
        elif not isinstance(part, _LINEAR):
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()


@contextmanager
def linears_in_float32(module: Any) -> Iterator[None]:
    linears: list[Any] = [part for part in module.modules() if isinstance(part, _LINEAR)]
    try:
        for part in linears:
            part.forward = partial(_multiply, part)
        yield
    finally:
        for part in linears:
            del part.forward


def _widen_output(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _multiply(part: Any, inputs: Tensor) -> Tensor:
    weight = part.weight.t() if isinstance(part, _CONV1D) else part.weight  # [n, k]
    outputs = torch.cat([inputs @ rows.float().t() for rows in weight.split(_ROWS_AT_ONCE)], dim=-1)
    return outputs if part.bias is None else outputs + part.bias.float()
