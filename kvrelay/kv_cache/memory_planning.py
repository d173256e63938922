"""How much memory KV takes and how many blocks fit. Arithmetic only: asks no device and knows no tensors."""

from dataclasses import dataclass

from kvrelay.errors import ConfigError
from kvrelay.model_spec import DTYPE_BYTES, KVLayout


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a pool of a given size can hold."""

    block_size: int
    """Tokens per block."""
    num_blocks: int
    bytes_per_token: int
    """KV of one token in all layers."""
    bytes_per_block: int
    bytes_per_sequence: int
    """KV of one sequence of `context_tokens`, in whole blocks."""
    pool_bytes: int
    context_tokens: int
    """Length of the sequence that was planned for."""
    max_tokens: int
    """Tokens that fit into the pool."""
    max_sequences: int
    """Sequences of `context_tokens` that fit at once, none shared."""


def blocks_for_tokens(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens of one sequence."""
    return -(-num_tokens // block_size)


def bytes_per_block(layout: KVLayout, block_size: int) -> int:
    """Bytes of one block: K and V of `block_size` tokens in all layers."""
    return layout.bytes_per_token * block_size


def bytes_per_sequence(layout: KVLayout, num_tokens: int, block_size: int) -> int:
    """Bytes of the blocks that one sequence of so many tokens holds."""
    return blocks_for_tokens(num_tokens, block_size) * bytes_per_block(layout, block_size)


def blocks_for_budget(layout: KVLayout, block_size: int, budget_bytes: int) -> int:
    """Blocks that fit into a byte budget.

    Raises:
        ConfigError: not even one block fits.
    """
    num_blocks = budget_bytes // bytes_per_block(layout, block_size)
    if num_blocks < 1:
        raise ConfigError(
            f"a KV budget of {budget_bytes} bytes holds no block; one block of {block_size} tokens takes "
            f"{bytes_per_block(layout, block_size)} bytes: raise the KV memory"
        )
    return num_blocks


def budget_from_fraction(total_bytes: int, fraction: float, reserved_bytes: int = 0) -> int:
    """Bytes for KV: a fraction of the memory, less what weights and activations take of it.

    Args:
        total_bytes: the device's or machine's memory.
        fraction: share of it that the worker may use, in (0, 1].
        reserved_bytes: weights, activations and what else must fit into that share.

    Raises:
        ConfigError: the fraction is out of range, or nothing is left.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"the memory fraction is {fraction}; it must lie in (0, 1]")
    budget_bytes = int(total_bytes * fraction) - reserved_bytes
    if budget_bytes <= 0:
        raise ConfigError(
            f"{fraction:g} of {total_bytes} bytes leaves nothing for KV after {reserved_bytes} bytes of weights: "
            "raise the fraction, or choose a smaller model or dtype"
        )
    return budget_bytes


def plan_memory(layout: KVLayout, block_size: int, budget_bytes: int, context_tokens: int) -> MemoryPlan:
    """What fits into a byte budget.

    Args:
        layout: the model's KV layout.
        block_size: tokens per block.
        budget_bytes: memory for the pool.
        context_tokens: length of the sequences to plan for.

    Raises:
        ConfigError: not even one block fits.
    """
    num_blocks = blocks_for_budget(layout, block_size, budget_bytes)
    return MemoryPlan(
        block_size=block_size,
        num_blocks=num_blocks,
        bytes_per_token=layout.bytes_per_token,
        bytes_per_block=bytes_per_block(layout, block_size),
        bytes_per_sequence=bytes_per_sequence(layout, context_tokens, block_size),
        pool_bytes=num_blocks * bytes_per_block(layout, block_size),
        context_tokens=context_tokens,
        max_tokens=num_blocks * block_size,
        max_sequences=num_blocks // blocks_for_tokens(context_tokens, block_size),
    )


def kv_cache_bytes(layout: KVLayout, batch_size: int, num_prompt_tokens: int, num_new_tokens: int) -> int:
    """KV of a batch at its longest: 2 * bytes * b * l * kv_heads * head_dim * (m + n).

    The general form of `mha_kv_cache_bytes_16_bit`, for attention whose query heads share KV heads: all of them one (MQA: Shazeer
    2019, "Fast Transformer Decoding: One Write-Head is All You Need"), or some each (GQA: Ainslie et al. 2023, "GQA: Training
    Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"). It counts the last new token, whose KV an engine
    computes only if it goes on: what is held when generation ends is that of m + n - 1 tokens.
    """
    return batch_size * layout.bytes_per_token * (num_prompt_tokens + num_new_tokens)


def mha_kv_cache_bytes_16_bit(
    batch_size: int, num_layers: int, hidden_size: int, num_prompt_tokens: int, num_new_tokens: int
) -> int:
    """KV of a batch with multi-head attention in 16 bit: 4 * b * l * h * (m + n), for K and V of 2 bytes each are as wide as h.

    Sheng et al. 2023, "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU", section 3.
    """
    return 4 * batch_size * num_layers * hidden_size * (num_prompt_tokens + num_new_tokens)


def attention_kind(num_heads: int, num_kv_heads: int) -> str:
    """MHA where every query head has a KV head, MQA where all share one, else GQA."""
    if num_heads == num_kv_heads:
        return "MHA"
    return "MQA" if num_kv_heads == 1 else "GQA"


INT8_GROUP = 64
"""Weights in int8 share a float32 scale in groups of so many."""


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """How many numbers a model's weights are, by what becomes of them."""

    num_matrix: int
    """Of linear layers, the output head included; what int8 quantizes."""
    num_other: int
    """Embeddings, norms, biases."""
    num_tied_head: int
    """Of an output head that shares its numbers with the embeddings, else 0; in neither of the others."""

    @property
    def num_parameters(self) -> int:
        """As a model's size is given; what is shared counts once."""
        return self.num_matrix + self.num_other


def weight_bytes(counts: WeightCounts, dtype: str) -> int:
    """Memory of the weights.

    In float32 and int8 the kernels read matrices of their own form, so a tied output head is there a second time.

    Args:
        counts: of the model.
        dtype: a dtype of floats, or int8: then matrices have one byte and a share of a scale for each number, all else 4 bytes.
    """
    if dtype == "int8":
        num_quantized = counts.num_matrix + counts.num_tied_head
        return num_quantized + 4 * -(-num_quantized // INT8_GROUP) + 4 * counts.num_other
    num_copied = counts.num_tied_head if dtype == "float32" else 0
    return DTYPE_BYTES[dtype] * (counts.num_parameters + num_copied)
