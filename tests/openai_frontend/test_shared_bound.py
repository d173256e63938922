"""What all clients of a front take from: one tenant gets at most half of it."""

from contextlib import ExitStack

import pytest

from kvrelay.errors import OverloadedError
from kvrelay.openai_frontend.shared_bound import SharedBound


def take(stack: ExitStack, bound: SharedBound, amount: int, tenant: str | None) -> bool:
    try:
        stack.enter_context(bound.taking(amount, tenant, 10, "full"))
    except OverloadedError:
        return False
    return True


def test_tenants_get_half_and_together_no_more_than_all() -> None:
    bound = SharedBound()
    with ExitStack() as stack:
        assert [take(stack, bound, 2, "a") for _ in range(3)] == [True, True, False]
        assert [take(stack, bound, 2, "b") for _ in range(3)] == [True, True, False]
        assert [take(stack, bound, 1, name) for name in ("c", "d", "e")] == [True, True, False]
    with ExitStack() as stack:
        assert take(stack, bound, 5, "c"), "what was given back is free"


def test_one_large_amount_is_taken_alone() -> None:
    bound = SharedBound()
    with ExitStack() as stack:
        assert take(stack, bound, 10, "a")
        assert not take(stack, bound, 1, "b")
    with ExitStack() as stack:
        assert not take(stack, bound, 11, "a")
        assert take(stack, bound, 1, "a")
        assert not take(stack, bound, 9, "a")


def test_clients_without_a_tenant_get_all() -> None:
    bound = SharedBound()
    with ExitStack() as stack:
        assert [take(stack, bound, 5, None) for _ in range(3)] == [True, True, False]


def test_a_failure_gives_back() -> None:
    bound = SharedBound()
    with pytest.raises(RuntimeError), bound.taking(10, "a", 10, "full"):
        raise RuntimeError
    with ExitStack() as stack:
        assert take(stack, bound, 10, "b")
