"""What is counted of a prefix's KV that changed, on numbers made up for it."""

import numpy as np

from benchmarks.kv_differences import KV, compare_kv, tokens_to_compute

SHAPE = (3, 2, 4, 2, 5)
"""Layers, K and V, tokens, heads, numbers of a head."""
ELEMENTS_OF_A_LAYER = 2 * 4 * 2 * 5


def random_kv() -> KV:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def test_equal_kv_has_no_stale_token_in_any_layer() -> None:
    found = compare_kv(random_kv(), [random_kv(), random_kv()])
    assert found.num_elements == ELEMENTS_OF_A_LAYER
    assert found.num_equal == (ELEMENTS_OF_A_LAYER,) * 3
    assert found.equal_layers == (0, 1, 2)
    assert found.num_stale_tokens == (0, 0, 0)
    assert found.max_difference == (0.0, 0.0, 0.0)
    assert tokens_to_compute(found, 7) == (7, 7, 7)


def test_a_token_is_stale_if_one_of_its_keys_or_values_differs_in_one_bit() -> None:
    alone, key_differs, value_differs = random_kv(), random_kv(), random_kv()
    key_differs[1, 0, 2, 1, 3] = np.nextafter(alone[1, 0, 2, 1, 3], np.float32(np.inf))
    value_differs[1, 1, :2] += 1
    found = compare_kv(alone, [key_differs])
    assert (found.num_equal[1], found.num_stale_tokens, found.equal_layers) == (
        ELEMENTS_OF_A_LAYER - 1,
        (0, 1, 0),
        (0, 2),
    )
    assert 0 < found.max_difference[1] < 1e-6
    found = compare_kv(alone, [value_differs])
    assert found.num_stale_tokens == (0, 2, 0)
    assert tokens_to_compute(found, 7) == (7, 9, 7)


def test_the_worst_of_several_continuations_counts_in_each_layer() -> None:
    alone, one, two = random_kv(), random_kv(), random_kv()
    one[0, 0, 0] += 1
    two[0, 0] += 0.5
    two[2, 1, 3, 1, 4] -= 2
    found = compare_kv(alone, [one, two])
    assert found.num_stale_tokens == (4, 0, 1)
    assert found.num_equal[0] == ELEMENTS_OF_A_LAYER // 2
    np.testing.assert_allclose(found.max_difference, (1.0, 0.0, 2.0), rtol=1e-6)
    assert found == compare_kv(alone, [two, one])


def test_zeros_of_unlike_sign_are_other_bits() -> None:
    zeros = np.zeros(SHAPE, dtype=np.float32)
    found = compare_kv(zeros, [-zeros])
    assert found.num_equal == (0, 0, 0)
    assert found.max_difference == (0.0, 0.0, 0.0)
