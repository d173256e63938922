"""Models with random weights, made where they are needed: speed and memory do not depend on what
the weights are.

No tokenizer comes with them. Knows nothing of the model store.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

SEED = 0
_COMMON: dict[str, Any] = {"hidden_size": 2048, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_COMMON,
        "model_type": "llama",
        "vocab_size": 128256,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "qwen3-1.7b": {
        **_COMMON,
        "model_type": "qwen3",
        "vocab_size": 151936,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
}
"""Of published models."""
SMALL = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def save_random_gpt2(folder: Path) -> Path:
    """GPT-2 as published in its smallest size: 124 million parameters, 12 layers, 12 heads, 1,024
    positions.
    """
    return _save(GPT2Config(), folder)


def save_tiny_llama(folder: Path, num_heads: int, num_kv_heads: int) -> Path:
    """A model of a few layers: MHA where the numbers are equal, MQA where there is one KV head,
    else GQA.
    """
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16 * num_heads,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=1024,
    )
    return _save(config, folder)


def save_random_model(folder: Path, shape: str, dtype: str) -> Path:
    """shape: one of SHAPES."""
    return _save(AutoConfig.for_model(**SHAPES[shape]), folder, getattr(torch, dtype))


def save_small_model(folder: Path, like: Path) -> Path:
    """A small one of the same architecture, with the same types of layers."""
    settings = AutoConfig.from_pretrained(like).to_dict() | SMALL
    settings["layer_types"] = (settings.get("layer_types") or [])[: SMALL["num_hidden_layers"]] or None
    return _save(AutoConfig.for_model(**settings), folder, torch.bfloat16)


def save_llama(folder: Path, dtype: str, **changes: int) -> Path:
    """changes: of transformers' config."""
    settings: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, **changes}
    return _save(LlamaConfig(**settings), folder, getattr(torch, dtype))


def _save(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a model of this config into `folder`."""
    auto_model: Any = AutoModelForCausalLM
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        auto_model.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder
