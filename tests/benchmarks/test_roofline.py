"""What a step must read and compute at least, for a model whose numbers can be added up by hand."""

from typing import get_args

import pytest

from benchmarks.roofline import LimitMeter, Limits, ModelCost, Product, StepCost
from kvrelay.kv_cache.memory_planning import WeightCounts
from kvrelay.models.shape import ModelShape

LAYER_WEIGHTS, HEAD_WEIGHTS = 1000, 10 * 8
SHAPE = ModelShape(
    architecture="llama",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    hidden_size=8,
    vocab_size=10,
    max_context_tokens=None,
    weights=WeightCounts(num_matrix=LAYER_WEIGHTS, num_other=100, num_tied_head=HEAD_WEIGHTS),
    is_estimated=False,
)
KV_BYTES = 2 * 2 * 2 * 2 * 4
COST = ModelCost(SHAPE, 4.0, "float32")
ATTENTION_OPERATIONS = 4 * 2 * 4 * 2


def test_a_decode_step_reads_weights_once_and_the_kv_of_every_sequence() -> None:
    one, four = COST.decode(1, 99), COST.decode(4, 99)
    assert one.num_bytes == 4 * (LAYER_WEIGHTS + HEAD_WEIGHTS) + 100 * KV_BYTES
    assert four.num_bytes - one.num_bytes == 3 * 100 * KV_BYTES
    assert four.num_operations == 4 * one.num_operations
    assert one.num_operations == 2 * (LAYER_WEIGHTS + HEAD_WEIGHTS) + 100 * ATTENTION_OPERATIONS


def test_chunks_of_a_prompt_read_the_weights_again_and_compute_the_same() -> None:
    whole, halves = COST.prefill(8, 8), COST.prefill(8, 4)
    assert (
        whole.num_operations
        == halves.num_operations
        == 16 * LAYER_WEIGHTS + 2 * HEAD_WEIGHTS + 36 * ATTENTION_OPERATIONS
    )
    assert halves.num_bytes - whole.num_bytes == 4 * LAYER_WEIGHTS + 4 * KV_BYTES


def test_an_untied_head_is_one_of_the_matrices() -> None:
    weights = WeightCounts(num_matrix=LAYER_WEIGHTS + HEAD_WEIGHTS, num_other=100, num_tied_head=0)
    untied = ModelShape(**{name: getattr(SHAPE, name) for name in SHAPE.__slots__} | {"weights": weights})
    assert ModelCost(untied, 4.0, "float32").prefill(8, 4) == COST.prefill(8, 4)


def test_the_slower_of_reading_and_computing_bounds_a_step() -> None:
    limits = Limits(bytes_per_s=100.0, operations_per_s=1000.0)
    assert limits.least_seconds(StepCost(200, 500)) == pytest.approx(2.0)
    assert limits.least_seconds(StepCost(20, 5000)) == pytest.approx(5.0)


@pytest.mark.parametrize("product", get_args(Product))
def test_the_machine_is_measured_in_the_type_that_is_multiplied(product: Product) -> None:
    meter = LimitMeter(1, product, matrix_size=64)
    limits = meter.measure()
    assert meter.bytes_per_s == [limits.bytes_per_s]
    assert meter.operations_per_s == [limits.operations_per_s]
    assert min(limits.bytes_per_s, limits.operations_per_s) > 0
