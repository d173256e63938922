"""Forms of all kinds with garbage in them: each is taken, or refused with its field; whatever is
taken has a first mask.
"""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.structured_output.grammar import CompiledGrammar
from tests.support.grammar_walks import allowed, compile_grammar

NUM_EXAMPLES = 60
fuzzed = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

KEYWORDS = [
    *(
        "type",
        "enum",
        "const",
        "anyOf",
        "allOf",
        "oneOf",
        "$ref",
        "$defs",
        "properties",
        "required",
        "additionalProperties",
    ),
    *(
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
    ),
    *(
        "uniqueItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
    ),
    *("discriminator", "propertyName", "not", "default", "a", "b"),
]
TEXTS = st.sampled_from(
    [
        "object",
        "array",
        "string",
        "integer",
        "number",
        "a",
        "b",
        "#",
        "#/$defs/a",
        "^a$",
        "^a",
        "(",
        "uuid",
        "x",
        "\ud800",
        "",
    ]
)
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.sampled_from([10**9, 10**30, 10**400, -0.5, 1e300, 1e-300]), TEXTS
)
SCALARS |= st.sampled_from([float("nan"), float("inf"), float("-inf")])
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4),
    max_leaves=12,
)
WORDS = ("{3,5}", "{1000000000}", "[^", "(?i)", "(?=", "\\p{L}", "\\b", "start", "start: ", "a: ", "%json ")
PIECES = st.lists(st.sampled_from([*'ab.*+?|()[]{}^$\\-,:/"<> \n', *WORDS]), max_size=12).map("".join)


def check(response_format: ResponseFormat) -> None:
    outcome = compiled_or_refused(response_format)
    if isinstance(outcome, InvalidRequestError):
        assert outcome.field == response_format.field
        assert len(outcome.problem) > 5
        return
    (mask,) = outcome.matcher().masks([], [], ())
    assert allowed(mask)


def compiled_or_refused(response_format: ResponseFormat) -> CompiledGrammar | InvalidRequestError:
    try:
        return compile_grammar(response_format)
    except InvalidRequestError as refused:
        return refused


@fuzzed
@given(SCHEMAS)
def test_any_json_as_a_schema_is_followed_or_refused(schema: Any) -> None:
    check(ResponseFormat(FormatKind.JSON_SCHEMA, json.dumps(schema)))


@fuzzed
@given(PIECES | st.text(max_size=20))
def test_any_text_as_a_pattern_is_followed_or_refused(pattern: str) -> None:
    check(ResponseFormat.regex(pattern))


@fuzzed
@given(PIECES.map("start: ".__add__) | PIECES.map("root ::= ".__add__) | st.text(max_size=20))
def test_any_text_as_a_grammar_is_followed_or_refused(source: str) -> None:
    check(ResponseFormat.grammar(source))
