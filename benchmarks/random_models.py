"""Models with random weights, made where they are needed: speed and memory do not depend on what
the weights are.

No tokenizer comes with them. Knows nothing of the model store.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

SEED = 0


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


def _save(config: PretrainedConfig, folder: Path) -> Path:
    """Writes a model of this config into `folder`, in float32."""
    auto_model: Any = AutoModelForCausalLM
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        auto_model.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
