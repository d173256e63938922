"""The response format as options: one of --json-schema, --regex, --grammar, --choice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvrelay.core.response_format import ResponseFormat
from kvrelay.errors import InvalidRequestError

FORMAT_OPTIONS = {
    "json_schema": (
        str,
        "JSON|@FILE",
        'Output is JSON that satisfies this schema; {"type": "object"} takes any object.',
    ),
    "regex": (str, "PATTERN", "Output is what this regular expression matches, from its beginning to its end."),
    "grammar": (str, "TEXT|@FILE", "Output is of this grammar: Lark with a rule start, or EBNF (GBNF) with root ::=."),
    "choice": (list[str], "TEXT", "Output is one of these texts. May be repeated."),
}
"""Type, metavar and help of each."""


def parse_format(given: Mapping[str, Any]) -> ResponseFormat | None:
    """`given` holds values by name of `FORMAT_OPTIONS`. Raises InvalidRequestError."""
    named = {name: value for name, value in given.items() if value is not None and value != []}
    if len(named) > 1:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
        raise InvalidRequestError("response_format", f"is given several times, by {flags}; give one of them")
    for name, value in named.items():
        match name:
            case "json_schema":
                return ResponseFormat.json_schema(_content(name, value))
            case "regex":
                return ResponseFormat.regex(value)
            case "grammar":
                return ResponseFormat.grammar(_content(name, value))
            case "choice":
                return ResponseFormat.choice(value)
    return None


def _content(name: str, value: str) -> str:
    """@FILE stands for the file's content."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(name, f"cannot be read from {value[1:]}: {error}") from None
