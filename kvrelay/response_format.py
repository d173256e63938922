"""What form a request's output must have: a JSON schema, a regular expression or a grammar, as a plain value.

Knows what is cheap to check. What grammars mean is known by `kvrelay.grammar`, which clients need not import.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvrelay.errors import InvalidRequestError

MAX_FORMAT_BYTES = 64 * 1024


class FormatKind(Enum):
    """What language the form is written in; the values are the names of the proto's fields."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The form of an output. Made by one of the class methods."""

    kind: FormatKind
    source: str

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> "ResponseFormat":
        """JSON that satisfies the schema, which may be given as text.

        Raises:
            InvalidRequestError: it holds what JSON cannot say.
        """
        if isinstance(schema, str):
            return cls(FormatKind.JSON_SCHEMA, schema)
        try:
            return cls(FormatKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError("response_format.json_schema", f"cannot be written as JSON: {error}") from None

    @classmethod
    def json_object(cls) -> "ResponseFormat":
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> "ResponseFormat":
        """Text that the pattern, in the syntax of Rust's regex crate, matches from its beginning to its end."""
        return cls(FormatKind.REGEX, pattern)

    @classmethod
    def grammar(cls, source: str) -> "ResponseFormat":
        """Text of a context-free language: in Lark's syntax, with a rule `start`, or in GBNF's, with a rule `root ::=`."""
        return cls(FormatKind.GRAMMAR, source)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> "ResponseFormat":
        """One of these texts.

        Raises:
            InvalidRequestError: there is none.
        """
        alternatives = list(texts)
        if not alternatives:
            raise InvalidRequestError("response_format.choice", "is empty; name at least one text")
        return cls.regex("|".join(f"(?:{_escape(text)})" for text in alternatives))

    @property
    def field(self) -> str:
        """The form's path within sampling parameters, for errors."""
        return f"response_format.{self.kind.value}"

    def validate(self) -> None:
        """Checks size and, of a schema, that it is JSON.

        Raises:
            InvalidRequestError: says what is wrong.
        """
        try:
            num_bytes = len(self.source.encode())
        except UnicodeEncodeError:
            raise InvalidRequestError(self.field, "is not valid Unicode text: it has a lone surrogate") from None
        if not 1 <= num_bytes <= MAX_FORMAT_BYTES:
            raise InvalidRequestError(self.field, f"has {num_bytes} bytes; it must have 1 to {MAX_FORMAT_BYTES}")
        if self.kind is FormatKind.JSON_SCHEMA:
            self._validate_schema()

    def _validate_schema(self) -> None:
        try:
            schema = json.loads(self.source)
        except RecursionError:
            raise InvalidRequestError(self.field, "is nested too deeply; move inner schemas to $defs") from None
        except ValueError as error:
            raise InvalidRequestError(self.field, f"is not JSON: {error}; send the schema as JSON text") from None
        if not isinstance(schema, dict | bool):
            raise InvalidRequestError(self.field, 'is no schema; a JSON schema is an object such as {"type": "object"}')


_META_CHARACTERS = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")


def _escape(text: str) -> str:
    """A pattern that matches just this text; `re.escape` also escapes what Rust's syntax does not let it."""
    return _META_CHARACTERS.sub(r"\\\g<0>", text)
