"""Sizes are compared before anything is walked, and what errors quote stays short."""

import pytest

from kvrelay.core.bounds import MAX_NAME_BYTES, check_count, check_length, check_request_id, is_request_id
from kvrelay.core.quoting import MAX_QUOTED_CHARACTERS, quoted
from kvrelay.errors import InvalidRequestError, RequestNotFoundError


def test_lengths_are_bytes_and_end_with_the_bound() -> None:
    check_length("name", "x" * MAX_NAME_BYTES)
    check_length("name", "é" * (MAX_NAME_BYTES // 2))
    for text in ("x" * (MAX_NAME_BYTES + 1), "é" * (MAX_NAME_BYTES // 2 + 1), "\ud800" * MAX_NAME_BYTES):
        with pytest.raises(InvalidRequestError, match="at most 128"):
            check_length("name", text)


def test_a_count_needs_no_walk() -> None:
    class Unwalkable:
        def __len__(self) -> int:
            return 10**9

        def __iter__(self) -> object:
            raise AssertionError("it was walked")

    with pytest.raises(InvalidRequestError, match="1000000000 entries; at most 16"):
        check_count("stop", Unwalkable(), 16)


@pytest.mark.parametrize(
    "text", ["", "x", "A" * 32, "a" * 31, "a" * 33, "a" * 32 + "\n", "{" * 32, "é" * 32, "٣" * 32, "x" * 200]
)
def test_only_hexadecimal_digits_are_an_id(text: str) -> None:
    assert is_request_id("0123456789abcdef" * 2)
    with pytest.raises(RequestNotFoundError) as refused:
        check_request_id(text)
    assert len(refused.value.message) < 200


@pytest.mark.parametrize(
    "value",
    [
        "\x01" * 2**20,
        b"\xff" * 2**20,
        10**5000,
        ["x" * 1000] * 1000,
        {str(number): "x" * 1000 for number in range(1000)},
        [[[[[["deep"]]]]]],
    ],
    ids=["text", "bytes", "digits", "list", "dict", "nested"],
)
def test_what_errors_quote_is_short_whatever_it_is(value: object) -> None:
    assert len(quoted(value)) <= MAX_QUOTED_CHARACTERS + 3


def test_short_values_are_quoted_as_they_are() -> None:
    assert [quoted(value) for value in ("hot", 2.5, None, True, [1, "a"])] == [
        "'hot'",
        "2.5",
        "None",
        "True",
        "[1, 'a']",
    ]
