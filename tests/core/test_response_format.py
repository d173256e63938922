"""Forms of outputs as values: how they are made, and what is wrong with them before any grammar is
compiled.
"""

import pytest

from kvrelay.core.response_format import MAX_FORMAT_BYTES, FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError


def test_a_schema_may_be_text_or_an_object() -> None:
    made = ResponseFormat.json_schema({"const": "é"})
    assert (
        made == ResponseFormat.json_schema('{"const": "é"}') == ResponseFormat(FormatKind.JSON_SCHEMA, '{"const": "é"}')
    )
    assert ResponseFormat.json_object().source == '{"type": "object"}'


@pytest.mark.parametrize(
    ("response_format", "problem"),
    [
        (ResponseFormat.regex(""), "has 0 bytes"),
        (ResponseFormat.regex("a" * (MAX_FORMAT_BYTES + 1)), "has 65537 bytes"),
        (ResponseFormat.grammar("\ud800"), "lone surrogate"),
        (ResponseFormat.json_schema("{"), "is not JSON"),
        (ResponseFormat.json_schema("[]"), "is no schema"),
        (ResponseFormat.json_schema("[" * 30_000 + "]" * 30_000), "nested too deeply"),
    ],
)
def test_what_is_no_form_is_refused_by_name(response_format: ResponseFormat, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        response_format.validate()
    assert refused.value.field == f"response_format.{response_format.kind.value}"


def test_the_largest_form_is_one() -> None:
    ResponseFormat.regex("a" * MAX_FORMAT_BYTES).validate()
    ResponseFormat.json_schema(True).validate()


def test_what_json_cannot_say_is_no_schema() -> None:
    with pytest.raises(InvalidRequestError, match="cannot be written as JSON"):
        ResponseFormat.json_schema({"const": object()})


def test_a_choice_needs_a_text() -> None:
    with pytest.raises(InvalidRequestError, match=r"response_format\.choice is empty"):
        ResponseFormat.choice([])
