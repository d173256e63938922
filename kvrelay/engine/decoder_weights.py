"""Reads decoders of transformers as the kernels describe them.

Knows where each architecture keeps its parts, and nothing of how they are packed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvrelay.engine.fast_transformers_import import transformers
from kvrelay.engine.native.library import MAX_ROPES, PANEL, OutputMode
from kvrelay.engine.native.packing import interleave_panels

CONV1D: Any = transformers.pytorch_utils.Conv1D  # a linear layer with its weight transposed
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")  # angles depend on more than the position
VECTOR = 8

Rope = Callable[[int], tuple[Tensor, Tensor]]
"""num_positions -> cosines and sines, each float32 [num_positions, rotary_dim / 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of an architecture's parts. Linear layers that read the same rows become one."""

    norms: Mapping[str, str]  # field of DecoderLayer -> part of a layer
    layers: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    position_embeddings: str | None = None
    rotary: str | None = "model.rotary_emb"
    final_norm: str = "model.norm"
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    has_gate: bool = True
    down: str = "mlp.down_proj"
    activation: str = "hidden_act"  # in the config
    not_with: tuple[str, ...] = ()  # settings that the kernels do not know


_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_OUT_NORMS = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
_LLAMA = Layout(norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"})
_GPT2 = Layout(
    norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
    layers="transformer.h",
    embeddings="transformer.wte",
    position_embeddings="transformer.wpe",
    rotary=None,
    final_norm="transformer.ln_f",
    attention="attn",
    qkv=("attn.c_attn",),
    output="attn.c_proj",
    up=("mlp.c_fc",),
    has_gate=False,
    down="mlp.c_proj",
    activation="activation_function",
)

LAYOUTS: Mapping[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3"), _LLAMA),
    "qwen3": replace(_LLAMA, norms={**_LLAMA.norms, **_HEAD_NORMS}),
    "phi3": replace(_LLAMA, qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    "gpt2": _GPT2,
    "starcoder2": replace(_LLAMA, up=("mlp.c_fc",), has_gate=False, down="mlp.c_proj"),
    "olmo2": replace(_LLAMA, norms={**_OUT_NORMS, **_HEAD_NORMS}),
    "gemma3_text": replace(
        _LLAMA,
        norms={
            **_OUT_NORMS,
            **_HEAD_NORMS,
            "attention_norm": "input_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
        },
        norm_offset=1.0,
        activation="hidden_activation",
        not_with=("final_logit_softcapping",),
    ),
}
"""Of the architectures that kernels compute as a whole."""

_UP_MODES = {
    (True, "silu"): OutputMode.SILU_GATED,
    (True, "gelu_pytorch_tanh"): OutputMode.GELU_GATED,
    (False, "gelu_pytorch_tanh"): OutputMode.GELU,
    (False, "gelu_new"): OutputMode.GELU,
}


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [n, k]
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    bias: Tensor | None  # None: the mean stays
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    qkv: Linear
    output: Linear
    up: Linear  # with a gate its panels alternate
    down: Linear
    norms: Mapping[str, Norm]
    window: int
    rope: int  # -1: none
    attention_scale: float

    @property
    def linears(self) -> Mapping[str, Linear]:
        return {"qkv": self.qkv, "output": self.output, "up": self.up, "down": self.down}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    layers: tuple[LayerWeights, ...]
    embeddings: Tensor
    embedding_scale: float
    position_embeddings: Tensor | None
    final_norm: Norm
    head: Linear
    up_mode: OutputMode
    ropes: tuple[Rope, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_decoder(module: Any, architecture: str, windows: Sequence[int | None]) -> DecoderWeights | None:
    """None: the kernels cannot compute it as a whole. windows: of each layer, not the config's."""
    layout = LAYOUTS.get(architecture)
    if layout is None:
        return None
    config = module.config
    up_mode = _UP_MODES.get((layout.has_gate, getattr(config, layout.activation)))
    ropes = {} if layout.rotary is None else _ropes(module.get_submodule(layout.rotary), config)
    if up_mode is None or ropes is None or any(getattr(config, name) is not None for name in layout.not_with):
        return None
    layers = list(module.get_submodule(layout.layers))
    attention = layers[0].get_submodule(layout.attention)
    embeddings = module.get_submodule(layout.embeddings)
    intermediate = _linear(layers[0].get_submodule(layout.down)).weight.shape[1]
    if embeddings.weight.shape[1] % VECTOR or attention.head_dim % PANEL or intermediate % PANEL:
        return None
    positions = layout.position_embeddings
    return DecoderWeights(
        layers=tuple(
            _read_layer(layer, layout, window, list(ropes)) for layer, window in zip(layers, windows, strict=True)
        ),
        embeddings=embeddings.weight.detach(),
        embedding_scale=_embedding_scale(embeddings),
        position_embeddings=None if positions is None else module.get_submodule(positions).weight.detach(),
        final_norm=_norm(module.get_submodule(layout.final_norm), layout),
        head=_linear(module.lm_head),
        up_mode=up_mode,
        ropes=tuple(ropes.values()),
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=attention.head_dim,
    )


def _embedding_scale(embeddings: Any) -> float:
    scale = getattr(embeddings, "embed_scale", None)
    return 1.0 if scale is None else float(scale.to(embeddings.weight.dtype))


def _read_layer(layer: Any, layout: Layout, window: int | None, rope_kinds: list[str | None]) -> LayerWeights:
    attention = layer.get_submodule(layout.attention)
    up = _joined([_linear(layer.get_submodule(name)) for name in layout.up])
    has_rope = bool(rope_kinds) and getattr(attention, "use_rope", True)
    return LayerWeights(
        qkv=_joined([_linear(layer.get_submodule(name)) for name in layout.qkv]),
        output=_linear(layer.get_submodule(layout.output)),
        up=_gated(up) if layout.has_gate else up,
        down=_linear(layer.get_submodule(layout.down)),
        norms={field: _norm(layer.get_submodule(name), layout) for field, name in layout.norms.items()},
        window=window or 0,
        rope=rope_kinds.index(None if None in rope_kinds else attention.layer_type) if has_rope else -1,
        attention_scale=attention.scaling,
    )


def _linear(part: Any) -> Linear:
    weight: Tensor = part.weight.detach()
    return Linear(weight.t() if isinstance(part, CONV1D) else weight, None if part.bias is None else part.bias.detach())


def _joined(parts: Sequence[Linear]) -> Linear:
    biases = [part.bias for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "layers that read the same rows have biases, or none of them has"
    if len(parts) == 1:
        return parts[0]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def _gated(joined: Linear) -> Linear:
    """Of gates and then their factors."""
    bias = None if joined.bias is None else interleave_panels(*joined.bias.chunk(2))
    return Linear(interleave_panels(*joined.weight.chunk(2)), bias)


def _norm(part: Any, layout: Layout) -> Norm:
    weight, bias = part.weight.detach(), getattr(part, "bias", None)
    epsilon = part.eps if hasattr(part, "eps") else part.variance_epsilon
    return Norm(weight.float() + layout.norm_offset, None if bias is None else bias.detach(), epsilon)


def _ropes(rotary: Any, config: Any) -> dict[str | None, Rope] | None:
    """By type of layer, or one under None; None: the kernels do not know these."""
    parameters = config.rope_parameters or {}
    by_type: dict[str | None, Any] = {None: parameters}
    if any(isinstance(value, dict) for value in parameters.values()):
        by_type = {name: parameters[name] for name in sorted(set(config.layer_types))}
    if len(by_type) > MAX_ROPES or any(value.get("rope_type") in LENGTH_DEPENDENT_ROPE for value in by_type.values()):
        return None
    return {name: _rope(rotary, () if name is None else (name,)) for name in by_type}


def _rope(rotary: Any, arguments: tuple[str, ...]) -> Rope:
    def angles(num_positions: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            # [1, num_positions, rotary_dim]
            cosines, sines = rotary(torch.empty(1), torch.arange(num_positions).unsqueeze(0), *arguments)
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()

    return angles
