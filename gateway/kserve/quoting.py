"""What a client sent, as an error quotes it: a status travels in headers, which have little room."""

MAX_QUOTED_CHARACTERS = 64


def shortened(text: str) -> str:
    """The text's beginning."""
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def quoted(value: object) -> str:
    """The value as Python writes it, shortened."""
    return shortened(repr(value[:MAX_QUOTED_CHARACTERS] if isinstance(value, str) else value))
