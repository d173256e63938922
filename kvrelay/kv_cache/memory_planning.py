"""How much memory KV takes and how many blocks fit."""

from dataclasses import dataclass

from kvrelay.core.model_spec import DTYPE_BYTES, KVLayout
from kvrelay.errors import ConfigError


def blocks_for_tokens(num_tokens: int, block_size: int) -> int:  # of one sequence
    return -(-num_tokens // block_size)


def bytes_per_block(layout: KVLayout, block_size: int) -> int:  # K and V in all layers
    return layout.bytes_per_token * block_size


def blocks_for_budget(layout: KVLayout, block_size: int, budget_bytes: int) -> int:
    """Raises ConfigError: not even one block fits."""
    num_blocks = budget_bytes // bytes_per_block(layout, block_size)
    if num_blocks < 1:
        raise ConfigError(
            f"a KV budget of {budget_bytes} bytes holds no block; one block of {block_size} tokens takes "
            f"{bytes_per_block(layout, block_size)} bytes: raise the KV memory"
        )
    return num_blocks


def kv_cache_bytes(layout: KVLayout, batch_size: int, num_prompt_tokens: int, num_new_tokens: int) -> int:
    """2 * bytes * b * l * kv_heads * head_dim * (m + n), at the batch's longest.

    One KV head serves all query heads in MQA (Shazeer 2019, "Fast Transformer Decoding: One
    Write-Head is All You Need"), some in GQA (Ainslie et al. 2023, "GQA: Training Generalized
    Multi-Query Transformer Models from Multi-Head Checkpoints").
    """
    return batch_size * layout.bytes_per_token * (num_prompt_tokens + num_new_tokens)


def mha_kv_cache_bytes_16_bit(
    batch_size: int, num_layers: int, hidden_size: int, num_prompt_tokens: int, num_new_tokens: int
) -> int:
    """4 * b * l * h * (m + n): K and V are as wide as h.

    Sheng et al. 2023, "FlexGen: High-Throughput Generative Inference of Large Language Models with
    a Single GPU", section 3.
    """
    return 4 * batch_size * num_layers * hidden_size * (num_prompt_tokens + num_new_tokens)


def attention_kind(num_heads: int, num_kv_heads: int) -> str:
    if num_heads == num_kv_heads:
        return "MHA"
    return "MQA" if num_kv_heads == 1 else "GQA"


INT8_GROUP = 64  # weights that share one float32 scale


@dataclass(frozen=True, slots=True)
class WeightCounts:
    num_matrix: int  # linear layers and output head: what int8 quantizes
    num_other: int  # embeddings, norms, biases
    num_tied_head: int  # an output head that shares the embeddings; not in the other counts

    @property
    def num_parameters(self) -> int:
        """Counts shared numbers once."""
        return self.num_matrix + self.num_other


def weight_bytes(counts: WeightCounts, dtype: str) -> int:
    """In float32 and int8 the kernels copy matrices, a tied output head too."""
    if dtype == "int8":
        num_quantized = counts.num_matrix + counts.num_tied_head
        return num_quantized + 4 * -(-num_quantized // INT8_GROUP) + 4 * counts.num_other
    num_copied = counts.num_tied_head if dtype == "float32" else 0
    return DTYPE_BYTES[dtype] * (counts.num_parameters + num_copied)
