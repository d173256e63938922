"""How much memory KV takes and how many blocks fit. Arithmetic only: asks no device and knows no tensors."""

from dataclasses import dataclass

from kvrelay.errors import ConfigError
from kvrelay.model_spec import KVLayout


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
