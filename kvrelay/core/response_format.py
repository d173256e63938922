"""The response format of an output, as text. Makes the cheap checks only.

`kvrelay.structured_output` compiles formats; clients need not import it.
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
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Made by one of the class methods."""

    kind: FormatKind
    source: str

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> "ResponseFormat":
        """JSON that satisfies the schema.

        Raises:
            InvalidRequestError: the schema holds what JSON cannot say.
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
        """Text that the pattern matches as a whole, in the syntax of Rust's regex crate."""
        return cls(FormatKind.REGEX, pattern)

    @classmethod
    def grammar(cls, source: str) -> "ResponseFormat":
        """Text of a context-free language: Lark with a rule `start`, or GBNF with `root ::=`."""
        return cls(FormatKind.GRAMMAR, source)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> "ResponseFormat":
        """One of these texts.

        Raises:
            InvalidRequestError: there is none, or they are too long together.
        """
        alternatives = list(texts)
        if not alternatives:
            raise InvalidRequestError("response_format.choice", "is empty; name at least one text")
        # As a pattern each has five characters more: what is too long is not made.
        if sum(map(len, alternatives)) + 5 * len(alternatives) > MAX_FORMAT_BYTES + 1:
            problem = f"is longer than {MAX_FORMAT_BYTES} bytes as a pattern; name fewer or shorter texts"
            raise InvalidRequestError("response_format.choice", problem)
        return cls.regex("|".join(f"(?:{_escape(text)})" for text in alternatives))

    @property
    def field(self) -> str:
        return f"response_format.{self.kind.value}"

    def validate(self) -> None:
        """Raises InvalidRequestError for a wrong size, or a schema that is not JSON."""
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
    """As `re.escape`, but escapes only what Rust's syntax allows to."""
    return _META_CHARACTERS.sub(r"\\\g<0>", text)
