"""Modules with bfloat16 weights that compute in float32, without all weights widened at once."""

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from kvrelay.engine.decoder_weights import CONV1D, embedding_scale, is_experts

_LINEAR = (nn.Linear, CONV1D)
_ROWS_AT_ONCE = 1024  # of a weight


def compute_in_float32(module: Any, dtype: torch.dtype) -> None:
    """Widens all but linear layers, embeddings and experts, which widen what they use.

    Args:
        dtype: of embeddings before they are widened.
    """
    for part in module.modules():
        if isinstance(part, _LINEAR):
            vars(part)["forward"] = partial(_multiply, part)
        elif isinstance(part, nn.Embedding):
            vars(part)["forward"] = partial(_embed if dtype == torch.float32 else _embed_and_widen, part)
        elif is_experts(part):
            # transformers' plain forward, which takes one expert's weights after another
            vars(part)["forward"] = partial(inspect.unwrap(type(part).forward), _WideExperts(part))
        else:
            _widen(part)


def widen(module: Any) -> None:
    """Ends that: all weights become float32, part by part."""
    for part in module.modules():
        vars(part).pop("forward", None)
        _widen(part)


def widen_experts(module: Any) -> None:
    for part in module.modules():
        if is_experts(part):
            widen(part)


def _widen(part: Any) -> None:
    for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()


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


def _embed(part: Any, token_ids: Tensor) -> Tensor:
    return functional.embedding(token_ids, part.weight).float() * embedding_scale(part, torch.float32)


def _embed_and_widen(part: Any, *arguments: Any, **options: Any) -> Tensor:
    embedded: Tensor = type(part).forward(part, *arguments, **options)
    return embedded.float()


def _multiply(part: Any, inputs: Tensor) -> Tensor:
    weight = part.weight.t() if isinstance(part, CONV1D) else part.weight  # [n, k]
    outputs = torch.cat([inputs @ rows.float().t() for rows in weight.split(_ROWS_AT_ONCE)], dim=-1)
    return outputs if part.bias is None else outputs + part.bias.float()
