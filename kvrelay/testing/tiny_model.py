"""A llama of two layers with random weights and a byte-level BPE. Loads fast; made without torch.

Weights have a wide spread and a fixed seed: greedy output varies, and ties are rare.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = 320
EOS_TOKEN = "<|eos|>"
BOS_TOKEN = "<|bos|>"
PAD_TOKEN = "<|pad|>"
SPECIAL_TOKENS = (EOS_TOKEN, BOS_TOKEN, PAD_TOKEN, "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID, BOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2
MAX_CONTEXT_TOKENS = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_HIDDEN_SIZE, _INTERMEDIATE_SIZE, _NUM_LAYERS, _NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 64, 96, 2, 4, 2, 16
_SEED = 20240517
_TEXT = (
    "The cache of a causal model may be kept, copied and continued elsewhere, because the keys and values of a token\n"
    "depend on nothing that comes after it. The prefill worker runs the prompt; the decode worker continues it, "
    "one token at a\n"
    "time, and streams."
)


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"kvrelay-testing-{os.getuid()}"


def make_tiny_llama(
    folder: Path | None = None, *, seed: int = _SEED, max_context_tokens: int = MAX_CONTEXT_TOKENS
) -> Path:
    """Makes a model folder below `folder`, or finds an earlier one. Another seed is another
    model.
    """
    folder = folder or default_folder()
    target = folder / f"tiny-llama-{seed}-{max_context_tokens}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        _save_model(made, seed, max_context_tokens)
        _save_tokenizer(made, max_context_tokens)
        try:
            os.rename(made, target)
        except OSError:
            assert target.is_dir(), "another process was first; its model is the same"
    return target


def train_tokenizer() -> Any:
    """An object of the `tokenizers` library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _save_tokenizer(folder: Path, max_context_tokens: int) -> None:
    train_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS_TOKEN, "bos_token": BOS_TOKEN, "pad_token": PAD_TOKEN}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _save_model(folder: Path, seed: int, max_context_tokens: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> Any:
        return (generator.standard_normal(shape) * std).astype(np.float32)

    def norm() -> Any:
        return 1 + normal(_HIDDEN_SIZE, std=0.2)

    # [outputs, inputs], as in torch's linear layers
    tensors = {"model.embed_tokens.weight": normal(VOCAB_SIZE, _HIDDEN_SIZE, std=0.3), "model.norm.weight": norm()}
    tensors["lm_head.weight"] = normal(VOCAB_SIZE, _HIDDEN_SIZE, std=0.3)
    shapes = {
        "self_attn.q_proj": (_NUM_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.k_proj": (_NUM_KV_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.v_proj": (_NUM_KV_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.o_proj": (_HIDDEN_SIZE, _NUM_HEADS * _HEAD_DIM),
        "mlp.gate_proj": (_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
        "mlp.up_proj": (_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
        "mlp.down_proj": (_HIDDEN_SIZE, _INTERMEDIATE_SIZE),
    }
    for layer in range(_NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": normal(*shape, std=0.2) for name, shape in shapes.items()}
        tensors |= {f"{prefix}{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(max_context_tokens))
    special = {"bos_token_id": BOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID}
    _write_json(folder / "generation_config.json", {**special, "do_sample": False})


def _config(max_context_tokens: int) -> Mapping[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": _INTERMEDIATE_SIZE,
        "num_hidden_layers": _NUM_LAYERS,
        "num_attention_heads": _NUM_HEADS,
        "num_key_value_heads": _NUM_KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_context_tokens,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")
