"""Finds out at load whether a model can be served: by running it, not by its name.

Three short forwards check
1. that each layer calls our attention once, with K and V of one shape, and passes the metadata on;
2. what the model's own attention computes;
3. that paged attention computes the same, in two chunks beside another sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.attention_metadata import AttentionMetadata
from kvrelay.engine.kernel_batch import KernelBatch, SequenceInput
from kvrelay.engine.model_runner import forward_flat, keeps_logits
from kvrelay.engine.paged_attention import ATTENTION_NAME, AttentionMetadataMissingError, window_of
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ModelLoadError

# Some models pass these to attention; ours does not support them.
UNSUPPORTED_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "cu_seq_lens_q")
NUM_PROBED_TOKENS = 11
FORWARD_ERRORS = (
    AttentionMetadataMissingError,
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
# Between logits. Half precision may change the routing of experts.
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.9, "float16": 0.97}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    kv_layout: KVLayout
    vocab_size: int
    windows: tuple[int | None, ...]  # of each layer; None: a token sees all


class _CallRecorder:
    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}  # layer -> (num_kv_heads, head_dim)
        self.windows: dict[int, int | None] = {}
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
            self.windows[layer] = window_of(module, arguments)


def probe_model(module: Any, architecture: str, dtype: str, device: torch.device) -> ProbeResult:
    """Raises ModelLoadError if the model cannot be served."""
    with torch.inference_mode():
        try:
            found = _discover_layout(module, architecture, dtype, device)
            with short_windows(module):
                cosine = _compare_with_own_attention(module, found.kv_layout, found.vocab_size, device)
        except FORWARD_ERRORS as error:
            raise unsupported_architecture(
                architecture, f"its forward does not run with paged attention ({_describe(error)})"
            ) from error
    if not cosine >= MIN_COSINE[dtype]:
        raise unsupported_architecture(
            architecture, f"with paged attention it computes something else than alone (cosine {cosine:.3f})"
        )
    return found


@contextmanager
def short_windows(module: Any) -> Iterator[dict[int, int]]:
    """Shortens sliding windows in the block, so that a few tokens reach beyond them.

    Masks follow the config, attention its layers: both change. Yields old window -> short window.
    """
    holders = {id(holder): holder for holder in (module.config, module.config.get_text_config(), *module.modules())}
    windows: dict[int, int] = {}
    for key, holder in holders.items():
        window = getattr(holder, "sliding_window", None)
        if isinstance(window, int) and not isinstance(window, bool) and window > 0:
            windows[key] = window
    # 3, 5, 7... and the windows rise strictly, and so does the lesser of both.
    shortened = {window: min(window, 3 + 2 * rank) for rank, window in enumerate(sorted(set(windows.values())))}
    try:
        for key, window in windows.items():
            holders[key].sliding_window = shortened[window]
        yield shortened
    finally:
        for key, window in windows.items():
            holders[key].sliding_window = window


def unsupported_architecture(architecture: str, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"models of type {architecture} cannot be served: {why}. Choose a model whose attention goes through "
        "transformers' attention interface, such as llama, qwen3, mistral, gemma2, gpt2 or phi3"
    )


def _discover_layout(module: Any, architecture: str, dtype: str, device: torch.device) -> ProbeResult:
    recorder = _CallRecorder()
    batch = KernelBatch([SequenceInput([1, 2, 3], 0, (0,), num_logits=1)], block_size=4)
    logits = forward_flat(module, batch, recorder, device, keeps_logits(module))
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
    windows = tuple(recorder.windows[layer] for layer in range(num_layers))
    return ProbeResult(KVLayout(num_layers, num_kv_heads, head_dim, dtype), logits.shape[-1], windows)


def _compare_with_own_attention(module: Any, layout: KVLayout, vocab_size: int, device: torch.device) -> float:
    """Least cosine between logits of own and of paged attention."""
    tokens = [(7 * number + 3) % vocab_size for number in range(NUM_PROBED_TOKENS)]
    others = [(5 * number + 1) % vocab_size for number in range(4)]
    module.set_attn_implementation("eager")
    try:
        expected: Tensor = (
            module(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0, 5:].float()
        )
    finally:
        module.set_attn_implementation(ATTENTION_NAME)
    cache = PagedKVCache(layout, num_blocks=6, block_size=4, device=device)
    steps = [
        [SequenceInput(others[:3], 0, (0,), num_logits=0), SequenceInput(tokens[:5], 0, (4, 2, 5), num_logits=0)],
        [
            SequenceInput(others[3:], 3, (0,), num_logits=0),
            SequenceInput(tokens[5:], 5, (4, 2, 5), num_logits=NUM_PROBED_TOKENS - 5),
        ],
    ]
    for batch in steps:
        metadata = AttentionMetadata(cache, batch)
        logits = forward_flat(module, metadata.kernel_batch, metadata, device, keeps_logits(module))
    return least_cosine(logits, expected)


def least_cosine(logits: Tensor, expected: Tensor) -> float:
    """Of rows, without their means."""
    first, second = ((rows - rows.mean(dim=-1, keepdim=True)).double() for rows in (logits, expected))
    return float(torch.cosine_similarity(first, second, dim=-1).min())


def _describe(error: BaseException) -> str:
    if isinstance(error, AttentionMetadataMissingError):
        return "it does not pass keyword arguments on to attention"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
