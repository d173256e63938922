"""Shortens values in error messages, because a status travels in small headers."""

import reprlib

MAX_QUOTED_CHARACTERS = 64

_collections = reprlib.Repr()
_collections.maxlevel = 2
_collections.maxstring = MAX_QUOTED_CHARACTERS


def shortened(text: str, max_characters: int = MAX_QUOTED_CHARACTERS) -> str:
    return text if len(text) <= max_characters else f"{text[:max_characters]}..."


def quoted(value: object) -> str:
    """Looks at little more of a value than it shows."""
    if isinstance(value, str | bytes):
        return shortened(repr(value[: MAX_QUOTED_CHARACTERS + 1]))
    try:
        return shortened(_collections.repr(value))
    except ValueError:  # an int with more digits than Python writes
        return "a number of thousands of digits"
