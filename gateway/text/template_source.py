"""A model's chat template and the messages that it turns into text, as values."""

from collections.abc import Mapping
from dataclasses import dataclass

Message = Mapping[str, str]
"""`role` and `content`."""

MAX_TEMPLATE_BYTES = 256 * 1024
"""The longest that we know have 30 KiB."""


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """`special_tokens` are pairs of a name such as `bos_token` and its text."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()
