"""Writes a Llama model that lies in a safetensors folder as a GGUF file: F32, F16, BF16 or Q8_0.
For peers that read nothing else.

    python -m benchmarks.peers.gguf_writing MODEL_FOLDER TARGET.gguf --type q8_0

Knows the names and layouts of both formats for Llama with a byte-level BPE vocabulary, and of no
other architecture.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

WeightType = Literal["f32", "f16", "bf16", "q8_0"]

_QUANTIZATION = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_PRE_TOKENIZER = "smollm"


def write_gguf(folder: Path, target: Path, weight_type: WeightType) -> None:
    """Writes `target` whole or not at all; matrices in the given type, norms in F32.

    Raises:
        ValueError: the folder's model is not a Llama.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama":
        raise ValueError(f"{folder} holds a {config['model_type']}; only llama can be written")
    quantization, file_type = _QUANTIZATION[weight_type]
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _add_architecture(writer, config, folder.name, file_type)
    _add_vocabulary(writer, folder, config)
    for name, weight in _tensors(folder, config):
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            continue
        data = gguf.quantize(weight, quantization)
        writer.add_tensor(name, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(target)


def _add_architecture(
    writer: gguf.GGUFWriter, config: dict[str, Any], name: str, file_type: gguf.LlamaFileType
) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokens = [f"[PAD{token_id}]" for token_id in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, token_id in tokenizer["model"]["vocab"].items():
        tokens[token_id], types[token_id] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """GGUF name and float32 weight of everything, in GGUF's layout."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        weight = weight.astype(np.float32)
        if name == "model.embed_tokens.weight":
            yield "token_embd.weight", weight
        elif name == "model.norm.weight":
            yield "output_norm.weight", weight
        elif name == "lm_head.weight":
            yield "output.weight", weight
        else:
            layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            if part == "self_attn.q_proj":
                weight = interleave_halves(weight, config["num_attention_heads"])
            elif part == "self_attn.k_proj":
                weight = interleave_halves(weight, config["num_key_value_heads"])
            yield f"blk.{layer}.{_NAMES[part]}.weight", weight


def interleave_halves(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rotary embedding pairs row i of a head with row i + head_dim / 2 in safetensors, and rows 2i
    and 2i + 1 in GGUF.

    Args:
        weight: [num_heads * head_dim, hidden_size]

    Returns:
        The same rows in GGUF's order.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.peers.gguf_writing", description="Writes a Llama as GGUF.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", choices=get_args(WeightType), default="f32", dest="weight_type")
    arguments = parser.parse_args()
    write_gguf(arguments.folder, arguments.target, arguments.weight_type)


if __name__ == "__main__":
    main()
