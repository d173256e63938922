"""Attention in bfloat16: the same bits on all variants and however a token comes to be computed. It
is as near to exact attention as its parts allow.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from kvrelay.engine.native import available_variants, load_library
from tests.engine.test_kernel_variants import (
    GROUP_HEADS,
    MAX_ROWS,
    REFERENCE,
    SCALE,
    Lengths,
    Pool,
    attended,
    library_of,
    others,
    pool_of,
    random,
    same_bits,
    small,
    steep,
    tame,
)
from tests.support import left_out

NUM_TOKENS = 700

pytestmark = pytest.mark.skipif(load_library() is None, reason=left_out.C_COMPILER)

parts = pytest.mark.parametrize("num_parts", [2, 1], ids=["split", "plain"])


def in_bfloat16(
    variant: str, pool: Pool, lengths: Sequence[tuple[int, int]], num_parts: int, window: int = 0, first_query: int = 0
) -> Tensor:
    return attended(library_of(variant), pool, lengths, window, first_query, num_parts=num_parts)


def bfloat16_pool(head_dim: int, content: Callable[..., Tensor] = random) -> Pool:
    return pool_of(library_of(REFERENCE), "bfloat16", head_dim, content)


@cache
def reference(
    head_dim: int, content: Callable[..., Tensor], lengths: Lengths, num_parts: int, window: int = 0
) -> Tensor:
    return in_bfloat16(REFERENCE, bfloat16_pool(head_dim, content), lengths, num_parts, window)


@others
@parts
@pytest.mark.parametrize(
    ("head_dim", "content"),
    [(16, random), (64, random), (80, random), (128, random), (64, tame), (80, steep), (64, small)],
)
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        (((0, 150),), 0),
        (((290, 1),), 0),
        (((100, 3), (0, 70)), 0),
        (((60, 1), (90, 1), (131, 4)), 0),
        (((200, 40),), 33),
    ],
)
def test_variants_have_the_same_bits(
    variant: str, num_parts: int, head_dim: int, content: Callable[..., Tensor], lengths: Lengths, window: int
) -> None:
    expected = reference(head_dim, content, lengths, num_parts, window)
    assert not expected.isnan().any()
    assert same_bits(in_bfloat16(variant, bfloat16_pool(head_dim, content), lengths, num_parts, window), expected)


@others
@parts
@pytest.mark.parametrize(("content", "window"), [(random, 0), (random, 50), (small, 0)])
def test_a_token_does_not_depend_on_how_many_come_with_it(
    variant: str, num_parts: int, content: Callable[..., Tensor], window: int
) -> None:
    pool = bfloat16_pool(64, content)
    expected = reference(64, content, ((100, MAX_ROWS),), num_parts, window)
    for count in range(1, MAX_ROWS + 1):
        assert same_bits(in_bfloat16(variant, pool, [(100, count)], num_parts, window), expected[:count]), count
    alone = [in_bfloat16(variant, pool, [(100 + row, 1)], num_parts, window, row) for row in range(MAX_ROWS)]
    assert same_bits(torch.cat(alone), expected)


@others
@parts
def test_contexts_of_1_to_700_and_chunks_that_begin_and_end_anywhere(variant: str, num_parts: int) -> None:
    pool = bfloat16_pool(64)
    expected = reference(64, random, ((0, NUM_TOKENS),), num_parts)
    chunks = [(begin, min(1 + 37 * begin % MAX_ROWS, NUM_TOKENS - begin)) for begin in range(0, NUM_TOKENS, 9)]
    for begin, count in [*chunks, *((position, 1) for position in range(NUM_TOKENS))]:
        computed = in_bfloat16(variant, pool, [(begin, count)], num_parts, first_query=begin)
        assert same_bits(computed, expected[begin : begin + count]), (begin, count)


def exact_attention(pool: Pool, num_tokens: int) -> tuple[Tensor, Tensor]:
    """In float64, and each row's largest sum of a score's absolute products."""
    head_dim = pool.queries.shape[-1]
    # [heads, tokens, head_dim]
    keys, values = (
        side.view(-1, side.shape[2], head_dim)[:num_tokens].double().transpose(0, 1).repeat_interleave(GROUP_HEADS, 0)
        for side in (pool.keys, pool.values)
    )
    queries = pool.queries[:num_tokens].double().transpose(0, 1) * SCALE
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    weights = (queries @ keys.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1)
    sizes = (queries.abs() @ keys.abs().transpose(1, 2)).masked_fill(hidden, 0).amax(-1)
    return (weights @ values).transpose(0, 1), sizes.transpose(0, 1).unsqueeze(-1)


@pytest.mark.parametrize("variant", available_variants())
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("content", [random, steep])
def test_errors_are_those_of_parts_that_have_8_bits_each(
    variant: str, head_dim: int, content: Callable[..., Tensor]
) -> None:
    pool, num_tokens = bfloat16_pool(head_dim, content), 200
    exact, sizes = exact_attention(pool, num_tokens)
    errors = {}
    for num_parts, precision in ((2, 2.0**-16), (1, 2.0**-8)):
        computed = in_bfloat16(variant, pool, [(0, num_tokens)], num_parts).double()
        # A score that is off by e changes its weight, and the sum of all, by a factor of exp(e).
        bound = pool.values.double().abs().max() * (torch.expm1(2 * precision * sizes) + precision)
        assert ((computed - exact).abs() <= bound).all()
        errors[num_parts] = float((computed - exact).norm())
    assert errors[1] > 20 * errors[2]
    assert errors[1] > 1e-4 * float(exact.norm()), "it is computed in bfloat16"
