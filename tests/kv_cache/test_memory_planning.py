import pytest

from kvrelay.errors import ConfigError
from kvrelay.kv_cache.memory_planning import (
    blocks_for_budget,
    blocks_for_tokens,
    budget_from_fraction,
    bytes_per_block,
    bytes_per_sequence,
    plan_memory,
)
from kvrelay.model_spec import KVLayout

SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
LLAMA_8B = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_tokens_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for_tokens(num_tokens, 16) == num_blocks


def test_known_models_take_their_known_bytes() -> None:
    assert LLAMA_8B.bytes_per_token == 128 * 1024
    assert SMOLLM2.bytes_per_token == 46_080
    assert bytes_per_block(LLAMA_8B, 16) == 2 * 1024**2
    assert bytes_per_sequence(LLAMA_8B, 8192, 16) == 1024**3
    assert bytes_per_sequence(LLAMA_8B, 8193, 16) == 1024**3 + 2 * 1024**2


def test_a_budget_holds_whole_blocks_only() -> None:
    block = bytes_per_block(LLAMA_8B, 16)
    assert blocks_for_budget(LLAMA_8B, 16, 10 * block) == 10
    assert blocks_for_budget(LLAMA_8B, 16, 10 * block - 1) == 9


def test_a_budget_below_one_block_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match="2097152 bytes"):
        blocks_for_budget(LLAMA_8B, 16, 1000)


def test_a_fraction_leaves_room_for_the_weights() -> None:
    assert budget_from_fraction(1000, 0.5, reserved_bytes=100) == 400


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        budget_from_fraction(1000, fraction)


def test_weights_that_fill_the_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves nothing"):
        budget_from_fraction(1000, 0.5, reserved_bytes=500)


def test_the_plan_adds_up() -> None:
    plan = plan_memory(LLAMA_8B, 16, budget_bytes=10 * 1024**3 + 5, context_tokens=8192)
    assert plan.num_blocks == 5120
    assert plan.pool_bytes == plan.num_blocks * plan.bytes_per_block <= 10 * 1024**3
    assert plan.max_tokens == 5120 * 16
    assert plan.max_sequences == 10
    assert plan.bytes_per_sequence * plan.max_sequences <= plan.pool_bytes
