import pytest

from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.native.library import GROUP
from kvrelay.errors import ConfigError
from kvrelay.kv_cache.memory_planning import (
    INT8_GROUP,
    WeightCounts,
    attention_kind,
    blocks_for_budget,
    blocks_for_tokens,
    bytes_per_block,
    kv_cache_bytes,
    mha_kv_cache_bytes_16_bit,
    weight_bytes,
)

SMOLLM2 = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="float32")
LLAMA_8B = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_tokens_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert blocks_for_tokens(num_tokens, 16) == num_blocks


def test_known_models_take_their_known_bytes() -> None:
    assert LLAMA_8B.bytes_per_token == 128 * 1024
    assert SMOLLM2.bytes_per_token == 46_080
    assert bytes_per_block(LLAMA_8B, 16) == 2 * 1024**2
    assert blocks_for_tokens(8192, 16) * bytes_per_block(LLAMA_8B, 16) == 1024**3


def test_a_budget_holds_whole_blocks_only() -> None:
    block = bytes_per_block(LLAMA_8B, 16)
    assert blocks_for_budget(LLAMA_8B, 16, 10 * block) == 10
    assert blocks_for_budget(LLAMA_8B, 16, 10 * block - 1) == 9


def test_a_budget_below_one_block_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match="2097152 bytes"):
        blocks_for_budget(LLAMA_8B, 16, 1000)


def test_the_formula_for_mha_in_16_bit_is_the_general_one_with_as_many_kv_heads_as_heads() -> None:
    gpt2 = KVLayout(num_layers=12, num_kv_heads=12, head_dim=64, dtype="float16")
    assert mha_kv_cache_bytes_16_bit(8, 12, 768, 512, 32) == kv_cache_bytes(gpt2, 8, 512, 32) == 4 * 8 * 12 * 768 * 544


def test_kv_heads_that_are_shared_save_their_share() -> None:
    by_heads = {heads: kv_cache_bytes(KVLayout(12, heads, 64, "float16"), 8, 512, 32) for heads in (12, 3, 1)}
    assert by_heads[12] == 4 * by_heads[3] == 12 * by_heads[1]


@pytest.mark.parametrize(("num_kv_heads", "kind"), [(12, "MHA"), (3, "GQA"), (1, "MQA")])
def test_attention_is_named_by_its_kv_heads(num_kv_heads: int, kind: str) -> None:
    assert attention_kind(12, num_kv_heads) == kind


def test_weights_in_int8_have_scales_and_leave_embeddings_as_they_are() -> None:
    counts = WeightCounts(num_matrix=6400, num_other=100, num_tied_head=0)
    assert weight_bytes(counts, "bfloat16") == 13_000
    assert weight_bytes(counts, "int8") == 6400 + 4 * 100 + 4 * 100


def test_a_tied_head_is_kept_twice_where_kernels_have_a_form_of_their_own() -> None:
    counts = WeightCounts(num_matrix=6400, num_other=1000, num_tied_head=640)
    assert counts.num_parameters == 7400
    assert weight_bytes(counts, "float32") == 4 * (7400 + 640)
    assert weight_bytes(counts, "float16") == 2 * 7400
    assert weight_bytes(counts, "int8") == 7040 + 4 * 110 + 4 * 1000


def test_scales_are_as_many_as_the_kernels_have() -> None:
    assert INT8_GROUP == GROUP
