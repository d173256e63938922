"""Modules with bfloat16 weights that compute in float32, without all weights widened at once."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvrelay.engine.decoder_weights import CONV1D, is_experts

_LINEAR = (nn.Linear, CONV1D)
_ROWS_AT_ONCE = 4096  # of a weight


def widen(module: Any, *, keeps_experts: bool) -> None:
    """Makes everything float32 but linear layers and embeddings, whose outputs become float32."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(_widen_output)
        elif not isinstance(part, _LINEAR) and not (keeps_experts and is_experts(part)):
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()


@contextmanager
def linears_in_float32(module: Any) -> Iterator[None]:
    changed: list[Any] = []
    parts: list[Any] = list(module.modules())
    try:
        for part in parts:
            if isinstance(part, _LINEAR):
                vars(part)["forward"] = partial(_multiply, part)
                changed.append(part)
            elif is_experts(part):
                # transformers' plain forward, which takes one expert's weights after another
                vars(part)["forward"] = partial(inspect.unwrap(type(part).forward), _WideExperts(part))
                changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


class _WideExperts:
    """An experts module whose weights become float32 as they are taken."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        return _WideRows(value) if isinstance(value, nn.Parameter) else value


class _WideRows:
    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __getitem__(self, index: Any) -> Tensor:
        return self._weights[index].float()


def _widen_output(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return output.float()


def _multiply(part: Any, inputs: Tensor) -> Tensor:
    weight = part.weight.t() if isinstance(part, CONV1D) else part.weight  # [n, k]
    outputs = torch.cat([inputs @ rows.float().t() for rows in weight.split(_ROWS_AT_ONCE)], dim=-1)
    return outputs if part.bias is None else outputs + part.bias.float()
