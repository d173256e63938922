"""Bytes of log probabilities: put together they are the text, whatever parts of characters the
tokens are.
"""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from kvrelay.openai_frontend.token_bytes import mend_entries


def entries_of(parts: list[bytes]) -> list[dict[str, Any]]:
    """As smg has them: each token decoded by itself."""
    texts = [part.decode("utf-8", "replace") for part in parts]
    return [{"token": text, "bytes": list(text.encode()), "logprob": -1.0, "top_logprobs": []} for text in texts]


def joined(entries: list[dict[str, Any]]) -> bytes:
    return bytes(value for entry in entries for value in entry["bytes"])


@given(st.text(max_size=12), st.lists(st.integers(1, 3), max_size=40))
# what follows a character of two tokens is the same character as one
@example("0\x80\x80", [1, 1, 1])
@example("\x80\x80\x80a\x80\x80", [3, 1, 2, 1, 1, 1])
def test_bytes_of_all_tokens_are_the_text(text: str, lengths: list[int]) -> None:
    rest, parts = text.encode(), []
    for length in lengths:
        parts.append(rest[:length])
        rest = rest[length:]
    entries = entries_of([part for part in [*parts, rest] if part])
    mend_entries(entries, text)
    assert joined(entries) == text.encode()


def test_a_character_of_several_tokens_is_given_with_the_last_of_them() -> None:
    entries = entries_of([b"a", b"\xf0\x9f\x98", b"\x80", b"b"])
    mend_entries(entries, "a\U0001f600b")
    assert [entry["token"] for entry in entries] == ["a", "", "\U0001f600", "b"]


def test_a_character_that_was_cut_off_has_no_bytes() -> None:
    entries = entries_of([b"a", b"\xf0\x9f"])
    mend_entries(entries, "a")
    assert joined(entries) == b"a"


def test_alternatives_whose_bytes_nothing_tells_have_none() -> None:
    entries = entries_of([b"a"])
    entries[0]["top_logprobs"] = [{"token": "\ufffd", "bytes": [239, 191, 189]}, {"token": "a", "bytes": [97]}]
    mend_entries(entries, "a")
    assert [top["bytes"] for top in entries[0]["top_logprobs"]] == [None, [97]]
