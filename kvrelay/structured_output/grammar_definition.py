"""Translates response formats to llguidance's own terms.

Call on a large stack: llguidance recurses as deep as a format is nested.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.structured_output.grammar_limits import JSON_LAYOUT
from kvrelay.structured_output.json_schema import adapt_schema
from kvrelay.structured_output.schema_source import SchemaProblem

MAX_PROBLEM_CHARACTERS = 300
NO_WAY_ON = "nothing may come behind what is written so far"


def define(response_format: ResponseFormat) -> str:
    """Raises InvalidRequestError when the format is wrong, or not supported."""
    from llguidance import LLMatcher

    response_format.validate()
    source = _source(response_format)
    with refusing(response_format):
        match response_format.kind:
            case FormatKind.JSON_SCHEMA:
                return LLMatcher.grammar_from_json_schema(source, defaults=JSON_LAYOUT)
            case FormatKind.REGEX:
                return LLMatcher.grammar_from_regex(source)
            case FormatKind.GRAMMAR:
                return LLMatcher.grammar_from_lark(source)


@contextmanager
def refusing(response_format: ResponseFormat) -> Iterator[None]:
    """Turns what llguidance raises, panics included, into InvalidRequestError."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise refusal(response_format, str(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no module exports this class
            raise
        raise refusal(response_format, f"panic: {error}") from None


def refusal(response_format: ResponseFormat, message: str) -> InvalidRequestError:
    problem = problem_of(message)
    if "oneOf constraints are not supported" in problem:
        problem = (
            "it has a oneOf whose alternatives may hold at once; "
            "give each a property with a const of its own, or use anyOf"
        )
    return InvalidRequestError(response_format.field, f"cannot be used: {problem}; correct it, or leave that part away")


def _source(response_format: ResponseFormat) -> str:
    match response_format.kind:
        case FormatKind.JSON_SCHEMA:
            try:
                return json.dumps(adapt_schema(response_format.source))
            except SchemaProblem as problem:
                raise InvalidRequestError(response_format.field, str(problem)) from None
        case FormatKind.REGEX:
            return response_format.source
        case FormatKind.GRAMMAR:
            return _as_lark(response_format)


def _as_lark(response_format: ResponseFormat) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if "%json" in response_format.source and re.search(r"multipleOf|\\u", response_format.source):
        raise InvalidRequestError(
            response_format.field, "has a schema with multipleOf or \\u in it; send it as json_schema"
        )
    try:
        return any_to_lark(response_format.source)
    except Exception as error:  # the converter raises nothing narrower
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else problem_of(str(error))
        raise InvalidRequestError(
            response_format.field, f"is no grammar: {problem}; send Lark with a rule start, or EBNF with root ::="
        ) from None


def problem_of(message: str) -> str:
    """Drops carets, repeated sources and internals."""
    if "panic" in message.lower() or "assertion" in message.lower():
        return "the grammar's compiler does not take it"
    if "NoExtension" in message:
        return NO_WAY_ON
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_PROBLEM_CHARACTERS else text[:MAX_PROBLEM_CHARACTERS] + "..."
