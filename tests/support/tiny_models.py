"""Tiny random causal language models with a tokenizer, one per architecture, for tests.

Weights have a wide spread and a fixed seed, so that greedy output varies and ties are rare. The
tokenizer is that of kvrelay.testing's tiny model.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from kvrelay.testing.tiny_model import (
    BOS_TOKEN,
    BOS_TOKEN_ID,
    CHAT_TEMPLATE,
    EOS_TOKEN,
    EOS_TOKEN_ID,
    MAX_CONTEXT_TOKENS,
    PAD_TOKEN,
    PAD_TOKEN_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    train_tokenizer,
)

__all__ = [
    "MAX_CONTEXT_TOKENS",
    "REFUSED_KINDS",
    "SPECIAL_TOKENS",
    "TINY_KINDS",
    "VOCAB_SIZE",
    "make_tiny_model",
    "save_tiny_tokenizer",
    "tiny_config",
]

SLIDING_WINDOW_TOKENS = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT_TOKENS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": EOS_TOKEN_ID,
    "bos_token_id": BOS_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
}
_GQA: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_SLIDING: dict[str, Any] = {
    "sliding_window": SLIDING_WINDOW_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GPT2: dict[str, Any] = {
    **{
        name: value
        for name, value in _COMMON.items()
        if name in ("vocab_size", "initializer_range", "tie_word_embeddings")
    },
    **{name: value for name, value in _COMMON.items() if name.endswith("_token_id")},
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_CONTEXT_TOKENS,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "scale_attn_by_inverse_layer_idx": True},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
    "gpt_bigcode": {**_GPT2, "multi_query": True},
    "llama": _GQA,
    "qwen2": _GQA,
    "qwen3": _GQA,
    "mistral": {**_GQA, "sliding_window": SLIDING_WINDOW_TOKENS},
    "gemma2": {
        **_GQA,
        **_SLIDING,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {**_GQA, **_SLIDING, "query_pre_attn_scalar": 16},
    "phi3": _GQA,
    "olmo2": _GQA,
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_GQA, **_EXPERTS},
    "olmoe": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "cohere": {**_GQA, "logit_scale": 0.5},
    "starcoder2": {**_GQA, "sliding_window": SLIDING_WINDOW_TOKENS, "use_sliding_window": True},
    "granite": {**_GQA, "logits_scaling": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "glm4": _GQA,
    "exaone4": {**_GQA, **_SLIDING, "sliding_window_pattern": 2},
    "gpt_oss": {**_GQA, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Their attention does not go through the attention interface; the loader refuses them.
    "gptj": {**_GPT2, "rotary_dim": 8},
    "bloom": {**_COMMON, "n_layer": 2, "n_head": 4},
    "mpt": {**_COMMON, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_CONTEXT_TOKENS},
    "stablelm": _GQA,
    "nemotron": _GQA,
}

REFUSED_KINDS = ("gptj", "bloom", "mpt", "stablelm", "nemotron")
TINY_KINDS = tuple(kind for kind in _CONFIGS if kind not in REFUSED_KINDS)
"""Kinds that kvrelay serves."""


def make_tiny_model(kind: str, folder: Path) -> Path:
    """Makes the tiny model of that kind under `folder`, or finds the earlier one.

    Args:
        kind: transformers' model type; one of TINY_KINDS or REFUSED_KINDS.
        folder: is made if missing; concurrent tests may share it.

    Returns:
        `folder / kind`, with config.json, generation_config.json, model.safetensors,
        tokenizer.json, tokenizer_config.json.
    """
    target = folder / kind
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / kind
        _save_model(kind, made)
        save_tiny_tokenizer(made)
        try:
            os.rename(made, target)
        except OSError:
            # Another process was first; its model is the same.
            assert target.is_dir()
    return target


def tiny_config(kind: str) -> dict[str, Any]:
    return dict(_CONFIGS[kind])


def save_tiny_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer_class: Any = PreTrainedTokenizerFast
    fast = tokenizer_class(
        tokenizer_object=train_tokenizer(),
        eos_token=EOS_TOKEN,
        bos_token=BOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=MAX_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _save_model(kind: str, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(kind, **_CONFIGS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240517)
        model = auto_model.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Initial zeros or ones (biases, norms, sinks) would hide mistakes in their use.
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            elif (
                parameter.std() < 0.1
                or "embed" in name
                or name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
            ):
                parameter.data.normal_(0.0, 0.3)
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
