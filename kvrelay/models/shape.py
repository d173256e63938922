"""A model's sizes, from config.json and the headers of safetensors files."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvrelay.core.model_spec import KVLayout
from kvrelay.errors import ModelLoadError
from kvrelay.kv_cache.memory_planning import WeightCounts

# Architectures have different names for the same size.
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_HEADS = ("num_attention_heads", "n_head", "n_heads")
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
INTERMEDIATE_SIZE = ("intermediate_size", "n_inner", "ffn_dim")
MAX_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

UNGATED_MLP = ("gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "starcoder2", "phi", "bloom", "mpt", "falcon")
"""All others have a gate besides their two matrices."""
LEARNED_POSITIONS = ("gpt2", "gpt_bigcode", "opt")

EMBEDDING_NAME = re.compile(r"embed|\bwte\b|\bwpe\b")
TOKEN_EMBEDDING_NAME = re.compile(r"(embed_tokens|word_embeddings|\bwte|embed_in)\.weight$")
HEAD_NAME = re.compile(r"(lm_head|embed_out)\.weight$")
MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ModelShape:
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context_tokens: int | None
    weights: WeightCounts
    is_estimated: bool
    """Set when the config gave the weights, because there are no safetensors files."""

    def kv_layout(self, dtype: str) -> KVLayout:
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, dtype)


def read_model_shape(folder: Path) -> ModelShape:
    """Raises ModelLoadError when there is no config, or it names no sizes."""
    path = folder / "config.json"
    try:
        whole = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(whole, dict) or "model_type" not in whole:
        raise ModelLoadError(f"{path} names no model_type")
    config: dict[str, Any] = whole | whole.get("text_config", {})
    architecture = str(config["model_type"])
    num_heads = _required(config, NUM_HEADS, path)
    hidden_size = _required(config, HIDDEN_SIZE, path)
    shape = ModelShape(
        architecture=architecture,
        num_layers=_required(config, NUM_LAYERS, path),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, architecture, num_heads),
        head_dim=config.get("head_dim") or hidden_size // num_heads,
        hidden_size=hidden_size,
        vocab_size=_required(config, ("vocab_size",), path),
        max_context_tokens=_optional(config, MAX_CONTEXT),
        weights=WeightCounts(0, 0, 0),
        is_estimated=False,
    )
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return replace(shape, weights=_count_stored(files))
    return replace(shape, weights=_count_by_config(shape, config), is_estimated=True)


def _num_kv_heads(config: Mapping[str, Any], architecture: str, num_heads: int) -> int:
    if config.get("multi_query", architecture == "gpt_bigcode"):
        return 1
    return int(config.get("num_key_value_heads") or config.get("num_kv_heads") or num_heads)


def _optional(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((int(config[name]) for name in names if config.get(name) is not None), None)


def _required(config: Mapping[str, Any], names: tuple[str, ...], path: Path) -> int:
    value = _optional(config, names)
    if value is None:
        raise ModelLoadError(
            f"{path} has none of {', '.join(names)}; it is no decoder-only model, or one that is not known here"
        )
    return value


def _count_stored(files: list[Path]) -> WeightCounts:
    num_matrix = num_other = num_token_embedding = 0
    has_head = False
    for name, shape in (tensor for path in files for tensor in _stored_tensors(path)):
        size = math.prod(shape)
        if (len(shape) >= 2 and not EMBEDDING_NAME.search(name)) or HEAD_NAME.search(name):
            num_matrix += size
        else:
            num_other += size
        has_head |= HEAD_NAME.search(name) is not None
        if TOKEN_EMBEDDING_NAME.search(name):
            num_token_embedding = size
    return WeightCounts(num_matrix, num_other, 0 if has_head else num_token_embedding)


def _stored_tensors(path: Path) -> Iterator[tuple[str, list[int]]]:
    """The file begins with 8 bytes of header length, and the header as JSON."""
    try:
        with path.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(num_bytes, MAX_HEADER_BYTES)))
        tensors = [
            (name, [int(size) for size in entry["shape"]]) for name, entry in header.items() if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is no safetensors file: copy or convert it again") from error
    yield from tensors


def _count_by_config(shape: ModelShape, config: Mapping[str, Any]) -> WeightCounts:
    """Leaves out biases."""
    hidden = shape.hidden_size
    num_embedding = shape.vocab_size * hidden
    attention = 2 * hidden * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    intermediate = _optional(config, INTERMEDIATE_SIZE) or 4 * hidden
    num_mlp_matrices = 2 if shape.architecture in UNGATED_MLP else 3
    mlp = num_mlp_matrices * hidden * intermediate * (_optional(config, NUM_EXPERTS) or 1)
    num_positions = (shape.max_context_tokens or 0) if shape.architecture in LEARNED_POSITIONS else 0
    is_tied = bool(config.get("tie_word_embeddings", True))
    return WeightCounts(
        num_matrix=shape.num_layers * (attention + mlp) + (0 if is_tied else num_embedding),
        num_other=num_embedding + num_positions * hidden + (2 * shape.num_layers + 1) * hidden,
        num_tied_head=num_embedding if is_tied else 0,
    )
