"""Finds out at load whether a model can be served: by running it, not by its name.

Three short forwards tell
1. whether every layer calls our attention once, with K and V of one shape, and passes the context on;
2. what the model's own attention computes for a few tokens;
3. whether paged attention computes the same, when the tokens come in two chunks beside another sequence. This fails for models
   that keep state outside of KV (state space layers, convolutions), ignore the positions given to them, or mask in a way of
   their own.

Knows nothing of files.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvrelay.engine.attention_context import AttentionContext
from kvrelay.engine.model_runner import forward_flat
from kvrelay.engine.paged_attention import ATTENTION_NAME, AttentionContextMissingError
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.engine.step_input import StepInput
from kvrelay.errors import ModelLoadError
from kvrelay.model_spec import KVLayout

UNSUPPORTED_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q")
"""What some models hand to attention and ours does not do."""
FORWARD_ERRORS = (
    AttentionContextMissingError,
    AttributeError,
    AssertionError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model raises when it cannot be run our way."""
MIN_COSINE = {"float32": 0.999, "bfloat16": 0.9, "float16": 0.97}
"""How alike the logits must be; two unrelated rows of logits are near 0. Half precision may even route experts differently."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the probe found."""

    kv_layout: KVLayout
    vocab_size: int


class _CallRecorder:
    """Is told of every attention call of one forward."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        """Layer to (num_kv_heads, head_dim)."""
        self.problem: str | None = None

    def observe(self, module: Any, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        layer = getattr(module, "layer_idx", None)
        unsupported = [name for name in UNSUPPORTED_ARGUMENTS if arguments.get(name) is not None]
        if layer is None:
            self.problem = "its attention layers have no number"
        elif layer in self.shapes:
            self.problem = f"layer {layer} calls attention more than once"
        elif key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            self.problem = "keys and values have different shapes"
        elif unsupported:
            self.problem = f"its attention needs {', '.join(unsupported)}"
        elif arguments.get("is_causal") is False:
            self.problem = "its attention is not causal"
        else:
            self.shapes[layer] = (key.shape[1], key.shape[3])


def probe_model(module: Any, architecture: str, dtype: str, device: torch.device) -> ProbeResult:
    """Runs the probe.

    Args:
        module: the model, loaded with our attention.
        architecture: transformers' model type, for messages.
        dtype: the KV dtype.
        device: the model's device.

    Raises:
        ModelLoadError: the model cannot be served; says why.
    """
    with torch.inference_mode():
        try:
            layout, vocab_size = _discover_layout(module, architecture, dtype, device)
            cosine = _compare_with_own_attention(module, layout, vocab_size, device)
        except FORWARD_ERRORS as error:
            raise unsupported_architecture(
                architecture, f"its forward does not run with paged attention ({_describe(error)})"
            ) from error
    if not cosine >= MIN_COSINE[dtype]:
        raise unsupported_architecture(
            architecture, f"with paged attention it computes something else than alone (cosine {cosine:.3f})"
        )
    return ProbeResult(layout, vocab_size)


def unsupported_architecture(architecture: str, why: str) -> ModelLoadError:
    """The error that refuses a model's architecture, with the reason."""
    return ModelLoadError(
        f"models of type {architecture} cannot be served: {why}. Choose a model whose attention goes through transformers' "
        "attention interface, such as llama, qwen3, mistral, gemma2, gpt2 or phi3"
    )


def _discover_layout(module: Any, architecture: str, dtype: str, device: torch.device) -> tuple[KVLayout, int]:
    recorder = _CallRecorder()
    batch = [StepInput([1, 2, 3], 0, (), num_logits=1)]
    logits = forward_flat(module, batch, recorder, device, _keeps_logits(module))
    num_layers = module.config.get_text_config().num_hidden_layers
    if recorder.problem is None and len(recorder.shapes) != num_layers:
        recorder.problem = f"{len(recorder.shapes)} of its {num_layers} layers use the attention interface"
    if recorder.problem is None and len(set(recorder.shapes.values())) != 1:
        recorder.problem = "its layers have different numbers of KV heads or head sizes"
    if recorder.problem is None and sorted(recorder.shapes) != list(range(num_layers)):
        recorder.problem = "its attention layers are not numbered from 0"
    if recorder.problem is not None:
        raise unsupported_architecture(architecture, recorder.problem)
    num_kv_heads, head_dim = recorder.shapes[0]
    return KVLayout(num_layers, num_kv_heads, head_dim, dtype), logits.shape[-1]


def _compare_with_own_attention(module: Any, layout: KVLayout, vocab_size: int, device: torch.device) -> float:
    """Cosine between the logits of the model's own attention and of paged attention."""
    tokens = [(7 * number + 3) % vocab_size for number in range(9)]
    others = [(5 * number + 1) % vocab_size for number in range(4)]
    module.set_attn_implementation("eager")
    try:
        expected: Tensor = module(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, -1].float()
    finally:
        module.set_attn_implementation(ATTENTION_NAME)
    cache = PagedKVCache(layout, num_blocks=6, block_size=4, device=device)
    steps = [
        [StepInput(others[:3], 0, (0,), num_logits=0), StepInput(tokens[:5], 0, (4, 2, 5), num_logits=0)],
        [StepInput(others[3:], 3, (0,), num_logits=0), StepInput(tokens[5:], 5, (4, 2, 5), num_logits=1)],
    ]
    for batch in steps:
        logits = forward_flat(module, batch, AttentionContext(cache, batch), device, _keeps_logits(module))
    return float(torch.cosine_similarity(_centred(logits[0]), _centred(expected), dim=0))


def _centred(logits: Tensor) -> Tensor:
    return (logits - logits.mean()).double()


def _keeps_logits(module: Any) -> bool:
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def _describe(error: BaseException) -> str:
    if isinstance(error, AttentionContextMissingError):
        return "it does not pass keyword arguments on to attention"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
