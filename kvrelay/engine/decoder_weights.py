"""Reads decoders of transformers as the kernels describe them, layer by layer."""

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
    experts: str | None = None  # in place of `up` and `down`, in layers that have them
    router: str = "mlp.gate"
    clamps_gates: bool = False
    has_half_angles: bool = False  # each cosine once, where others repeat it for both numbers of a pair
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
    "mixtral": replace(_LLAMA, experts="mlp.experts"),
    "qwen3_moe": replace(_LLAMA, norms={**_LLAMA.norms, **_HEAD_NORMS}, experts="mlp.experts"),
    "olmoe": replace(_LLAMA, norms={**_LLAMA.norms, **_HEAD_NORMS}, experts="mlp.experts", not_with=("clip_qkv",)),
    "gpt_oss": replace(_LLAMA, experts="mlp.experts", router="mlp.router", clamps_gates=True, has_half_angles=True),
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
_CLAMPS = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # in the config; the kernels know no others


@dataclass(frozen=True, slots=True)
class Linear:
    """Parts of a module, until they are packed: [n, k] each, joined one behind the other."""

    parts: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] = ()
    alternate: bool = False  # the parts' panels: gates, and their factors

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(part) for part in self.parts), self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def weight(self) -> Tensor:
        return self._joined(self.parts)

    def bias(self) -> Tensor | None:
        return self._joined(self.biases) if self.biases else None

    def _joined(self, parts: tuple[Tensor, ...]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return interleave_panels(*parts) if self.alternate else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    bias: Tensor | None  # None: the mean stays
    epsilon: float


@dataclass(frozen=True, slots=True)
class Mlp:
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    module: Any
    qkv: Linear
    output: Linear
    router: Linear | None  # to the experts; None: there is one, for all tokens
    experts: tuple[Mlp, ...]
    experts_per_token: int
    shares_of_chosen: bool  # an expert's share is of those that a token has chosen, else of all
    norms: Mapping[str, Norm]
    window: int
    rope: int  # -1: none
    sinks: Tensor | None  # [num_heads]
    attention_scale: float

    @property
    def linears(self) -> list[Linear]:
        """All but the router."""
        return [self.qkv, self.output, *(part for expert in self.experts for part in (expert.up, expert.down))]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    num_layers: int
    layer: Callable[[int], LayerWeights]
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


def read_decoder(
    module: Any, architecture: str, windows: Sequence[int | None], dtype: torch.dtype
) -> DecoderWeights | None:
    """None: the kernels cannot compute it as a whole.

    Args:
        dtype: weights may be narrower.
    """
    layout = LAYOUTS.get(architecture)
    if layout is None or any(getattr(module.config, name) is not None for name in layout.not_with):
        return None
    config = module.config
    up_mode = _up_mode(layout, config)
    ropes = {} if layout.rotary is None else _ropes(module.get_submodule(layout.rotary), config, layout)
    if up_mode is None or ropes is None:
        return None
    layers = list(module.get_submodule(layout.layers))
    attention = layers[0].get_submodule(layout.attention)
    embeddings = module.get_submodule(layout.embeddings)

    def read(number: int) -> LayerWeights:
        return _read_layer(layers[number], layout, windows[number] or 0, list(ropes))

    widths = {read(number).experts[0].down.shape[1] for number in range(len(layers))}
    if embeddings.weight.shape[1] % VECTOR or any(width % PANEL for width in (attention.head_dim, *widths)):
        return None
    positions = layout.position_embeddings
    return DecoderWeights(
        num_layers=len(layers),
        layer=read,
        embeddings=embeddings.weight.detach(),
        embedding_scale=embedding_scale(embeddings, dtype),
        position_embeddings=None if positions is None else module.get_submodule(positions).weight.detach(),
        final_norm=_norm(module.get_submodule(layout.final_norm), layout),
        head=_linear(module.lm_head),
        up_mode=up_mode,
        ropes=tuple(ropes.values()),
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=attention.head_dim,
    )


def _up_mode(layout: Layout, config: Any) -> OutputMode | None:
    if layout.clamps_gates:
        is_known = all(getattr(config, name) == value for name, value in _CLAMPS.items())
        return OutputMode.CLAMPED_GATED if is_known else None
    return _UP_MODES.get((layout.has_gate, getattr(config, layout.activation)))


def embedding_scale(embeddings: Any, dtype: torch.dtype) -> float:
    scale: float = getattr(embeddings, "scalar_embed_scale", 1.0)
    return float(torch.tensor(scale).to(dtype))


def _read_layer(layer: Any, layout: Layout, window: int, rope_kinds: list[str | None]) -> LayerWeights:
    attention = layer.get_submodule(layout.attention)
    has_rope = bool(rope_kinds) and getattr(attention, "use_rope", True)
    sinks = getattr(attention, "sinks", None)
    router = _router(layer, layout)
    return LayerWeights(
        module=layer,
        qkv=_joined([_linear(layer.get_submodule(name)) for name in layout.qkv]),
        output=_linear(layer.get_submodule(layout.output)),
        router=None if router is None else _linear(router),
        experts=(_mlp(layer, layout),) if router is None else _experts(layer.get_submodule(layout.experts)),
        experts_per_token=1 if router is None else router.top_k,
        shares_of_chosen=getattr(router, "norm_topk_prob", True),
        norms={field: _norm(layer.get_submodule(name), layout) for field, name in layout.norms.items()},
        window=window,
        rope=rope_kinds.index(None if None in rope_kinds else attention.layer_type) if has_rope else -1,
        sinks=None if sinks is None else sinks.detach(),
        attention_scale=attention.scaling,
    )


def _router(layer: Any, layout: Layout) -> Any | None:
    """None: this layer has no experts, though others may."""
    if layout.experts is None or not any(name == layout.experts for name, _ in layer.named_modules()):
        return None
    return layer.get_submodule(layout.router)


def _mlp(layer: Any, layout: Layout) -> Mlp:
    up = _joined([_linear(layer.get_submodule(name)) for name in layout.up])
    return Mlp(_gated(up) if layout.has_gate else up, _linear(layer.get_submodule(layout.down)))


def _experts(part: Any) -> tuple[Mlp, ...]:
    """part: with weights [num_experts, n, k]; if it says so, transposed."""

    def linear(name: str, number: int) -> Linear:
        weight, bias = getattr(part, name)[number].detach(), getattr(part, f"{name}_bias", None)
        return Linear((weight.t() if part.is_transposed else weight,), () if bias is None else (bias[number].detach(),))

    num_experts = len(part.gate_up_proj)
    return tuple(
        Mlp(_gated(linear("gate_up_proj", number), in_turns=not part.is_concatenated), linear("down_proj", number))
        for number in range(num_experts)
    )


def is_experts(part: Any) -> bool:
    """A module of transformers with all experts' weights in one tensor."""
    return hasattr(part, "is_transposed") and hasattr(part, "gate_up_proj")


def _linear(part: Any) -> Linear:
    weight: Tensor = part.weight.detach()
    bias = getattr(part, "bias", None)
    return Linear((weight.t() if isinstance(part, CONV1D) else weight,), () if bias is None else (bias.detach(),))


def _joined(linears: Sequence[Linear]) -> Linear:
    biases = tuple(bias for linear in linears for bias in linear.biases)
    assert len(biases) in (0, len(linears)), "layers that read the same rows have biases, or none of them has"
    return Linear(tuple(part for linear in linears for part in linear.parts), biases)


def _gated(up: Linear, *, in_turns: bool = False) -> Linear:
    """up: gates and then their factors, or both in turns."""

    def halves(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if in_turns:
            return tuple(part[begin::2] for part in parts for begin in (0, 1))
        return parts if len(parts) != 1 else parts[0].chunk(2)

    return Linear(halves(up.parts), halves(up.biases), alternate=True)


def _norm(part: Any, layout: Layout) -> Norm:
    weight, bias = part.weight.detach(), getattr(part, "bias", None)
    epsilon = part.eps if hasattr(part, "eps") else part.variance_epsilon
    return Norm(weight.float() + layout.norm_offset, None if bias is None else bias.detach(), epsilon)


def _ropes(rotary: Any, config: Any, layout: Layout) -> dict[str | None, Rope] | None:
    """By type of layer, or one under None; None: the kernels do not know these."""
    parameters = config.rope_parameters or {}
    by_type: dict[str | None, Any] = {None: parameters}
    if any(isinstance(value, dict) for value in parameters.values()):
        by_type = {name: parameters[name] for name in sorted(set(config.layer_types))}
    if len(by_type) > MAX_ROPES or any(value.get("rope_type") in LENGTH_DEPENDENT_ROPE for value in by_type.values()):
        return None
    return {name: _rope(rotary, layout, () if name is None else (name,)) for name in by_type}


def _rope(rotary: Any, layout: Layout, arguments: tuple[str, ...]) -> Rope:
    def angles(num_positions: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            # [1, num_positions, rotary_dim]
            cosines, sines = rotary(torch.empty(1), torch.arange(num_positions).unsqueeze(0), *arguments)
        half = cosines.shape[-1] // (1 if layout.has_half_angles else 2)
        return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()

    return angles
