"""What strategies set aside, for traces small enough to count by hand, and for a large one against
our block manager.
"""

import pytest

from benchmarks.kv_waste import (
    TracedRequest,
    block_manager_usage,
    doubling,
    make_trace,
    maximum_size,
    paged,
    simulate,
    used_tokens,
    waste_share,
)

TWO = [TracedRequest(0, first_step=0, num_prompt_tokens=3, num_new_tokens=4), TracedRequest(1, 2, 5, 3)]
"""Tokens in steps 0 to 4: 3, 4, 5 + 5, 6 + 6, 7."""


def test_tokens_in_use_are_those_of_the_running_requests() -> None:
    assert used_tokens(TWO) == [3, 4, 10, 12, 7]


def test_a_maximum_size_buffer_is_there_from_begin_to_end() -> None:
    usage = simulate(TWO, maximum_size(64))
    assert usage.reserved_tokens == (64, 64, 128, 128, 64)
    assert waste_share(usage.reserved_tokens, used_tokens(TWO)) == pytest.approx(1 - 36 / 448)


def test_a_doubling_buffer_is_there_twice_while_it_moves() -> None:
    usage = simulate(TWO, doubling())
    # The first has 4, 4, then 8 beside the 4 that it leaves; the second has 8 all the time.
    assert usage.reserved_tokens == (4, 4, 4 + 8 + 8, 8 + 8, 8)
    assert usage.num_copied_tokens == 4


def test_blocks_waste_less_than_one_of_each_sequence() -> None:
    usage = simulate(TWO, paged(4))
    assert usage.reserved_tokens == (4, 4, 8 + 8, 8 + 8, 8)
    assert usage.num_copied_tokens == 0
    trace = make_trace(50, 512, 5.0, seed=1)
    for reserved, used, running in zip(
        simulate(trace, paged(16)).reserved_tokens,
        used_tokens(trace),
        simulate(trace, maximum_size(1)).reserved_tokens,
        strict=True,
    ):
        assert 0 <= reserved - used <= 15 * running


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_the_block_manager_holds_what_is_predicted(block_size: int) -> None:
    trace = make_trace(60, 1024, 4.0, seed=2)
    assert tuple(block_manager_usage(trace, block_size)) == simulate(trace, paged(block_size)).reserved_tokens


def test_equal_requests_are_two() -> None:
    twins = [TracedRequest(0, 0, 3, 2), TracedRequest(1, 0, 3, 2)]
    assert block_manager_usage(twins, 4) == [8, 8]


def test_a_trace_is_the_same_for_the_same_seed_and_within_its_limits() -> None:
    trace = make_trace(200, 256, 3.0, seed=7)
    assert trace == make_trace(200, 256, 3.0, seed=7)
    assert trace != make_trace(200, 256, 3.0, seed=8)
    assert all(request.num_prompt_tokens >= 1 and request.num_new_tokens >= 16 for request in trace)
    lengths = [request.num_prompt_tokens + request.num_new_tokens for request in trace]
    assert max(lengths) == 256
    assert min(lengths) < 100
