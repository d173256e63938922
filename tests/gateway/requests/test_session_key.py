"""A call's session key, from its metadata."""

import contextvars

import pytest

from gateway.requests.tenants import SESSION, current_session_key, take_session_key
from kvrelay.errors import InvalidRequestError


def key_of(*metadata: tuple[str, str | bytes]) -> str:
    """In a context of its own, as each call has one."""

    def take() -> str:
        take_session_key(metadata)
        return current_session_key()

    return contextvars.copy_context().run(take)


def test_a_call_has_the_key_that_it_sends_and_no_others() -> None:
    assert key_of((SESSION, "talk 1"), ("kvrelay-other", "x")) == "talk 1"
    assert key_of() == current_session_key() == ""


@pytest.mark.parametrize("keys", [["a" * 129], ["a", "b"]], ids=["too long", "twice"])
def test_a_key_that_is_none_is_refused(keys: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=SESSION):
        key_of(*((SESSION, key) for key in keys))
