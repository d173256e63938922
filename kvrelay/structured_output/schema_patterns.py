"""Which names the patterns of a JSON schema match.

llguidance takes linear time; Python's `re` may take exponential time on a client's pattern.
"""

import json
import re
from collections.abc import Iterable

from kvrelay.structured_output.grammar_limits import JSON_LAYOUT, byte_tokens, parser_limits

MAX_NAMES_OF_PATTERN = 100
_LITERALS = re.compile(r"\^\(?(?:\?:)?((?:[\w -]|\\[-._/])+(?:\|(?:[\w -]|\\[-._/])+)*)\)?\$", re.ASCII)


def names_of_pattern(pattern: str) -> list[str] | None:
    """Returns None unless the pattern lists names, as `^(a|b)$` does."""
    whole = _LITERALS.fullmatch(pattern)
    if whole is None:
        return None
    alternatives = whole[1].split("|")
    is_grouped = pattern.startswith("^(") and pattern.endswith(")$")
    if is_grouped != ("(" in pattern or ")" in pattern) or (len(alternatives) > 1 and not is_grouped):
        return None  # `^a|b$` begins with a or ends with b
    names = [re.sub(r"\\(.)", r"\1", alternative) for alternative in alternatives]
    return names if len(names) <= MAX_NAMES_OF_PATTERN else None


def matches_search(pattern: str, names: Iterable[str]) -> str | None:
    """Returns the first name in which the pattern is found."""
    from llguidance import LLMatcher

    try:
        definition = LLMatcher.grammar_from_json_schema(
            json.dumps({"type": "string", "pattern": pattern}), defaults=JSON_LAYOUT
        )
        start = LLMatcher(byte_tokens(), definition, log_level=0, limits=parser_limits())
    except (ValueError, TypeError):
        return None
    if start.is_error():
        return None
    for name in names:
        text = json.dumps(name, ensure_ascii=False).encode()
        matcher = start.deep_copy()
        if matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting():
            return name
    return None
