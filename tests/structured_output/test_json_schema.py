"""JSON schemas as they are followed: of Pydantic's models, formats, names and repetitions; and what
is refused, by name.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.structured_output.grammar import check_response_format
from kvrelay.structured_output.json_schema import adapt_schema
from kvrelay.structured_output.schema_instances import MAX_LOOKED_AT, endless_references
from kvrelay.structured_output.schema_patterns import matches_search, names_of_pattern
from kvrelay.structured_output.schema_source import MAX_DEPTH, SchemaProblem, parse_schema
from tests.support.grammar_walks import compile_grammar, may_be, random_text

NUM_WALKS = 12


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: Literal[7, 9]


class Dog(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog"] = "dog"
    trained: bool


class Puppy(Dog):
    kind: Literal["puppy", "whelp"] = "puppy"  # type: ignore[assignment]


class Owner(BaseModel):
    pets: list[Annotated[Cat | Dog | Puppy, Field(discriminator="kind")]] = Field(max_length=2)


class Paint(BaseModel):
    shades: dict[Colour, Literal[1, 2]]
    colours: set[Colour]
    both: frozenset[Literal[1, 2, 3]] = Field(min_length=2)


class Upload(BaseModel):
    content: bytes = Field(max_length=4)
    path: Path = Field(max_length=4)


def texts_of(schema: Any) -> list[str]:
    grammar = compile_grammar(ResponseFormat.json_schema(schema))
    texts = [text for seed in range(NUM_WALKS) if (text := random_text(grammar, seed)) is not None]
    assert len(texts) >= NUM_WALKS // 2
    return texts


def allows(schema: Any, value: Any) -> bool:
    return may_be(compile_grammar(ResponseFormat.json_schema(schema)), json.dumps(value))


@pytest.mark.parametrize("model", [Owner, Paint])
def test_what_a_pydantic_models_schema_allows_its_model_takes(model: type[BaseModel]) -> None:
    for text in texts_of(model.model_json_schema()):
        model.model_validate_json(text)


def test_alternatives_with_a_default_tag_are_told_apart_by_it() -> None:
    schema = TypeAdapter(Annotated[Cat | Dog, Field(discriminator="kind")]).json_schema()
    assert allows(schema, {"kind": "cat", "lives": 9})
    assert allows(schema, {"kind": "dog", "trained": True})
    assert not allows(schema, {"lives": 9})
    assert not allows(schema, {"kind": "dog", "lives": 9})


def test_a_tag_is_found_without_a_discriminator() -> None:
    alternatives = [
        {"properties": {"t": {"enum": [name]}, "a": {"const": 1}}, "additionalProperties": False} for name in "xy"
    ]
    schema = {"oneOf": alternatives}
    assert allows(schema, {"t": "y", "a": 1})
    assert not allows(schema, {"a": 1})


def test_alternatives_that_may_hold_at_once_are_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match=r"oneOf whose alternatives may hold at once; .* or use anyOf"):
        check_response_format(ResponseFormat.json_schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}))


ANNOTATIONS = ["binary", "byte", "password", "path", "file-path", "color", "decimal", "regex", "iri", "x-mine"]


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_format_that_says_no_form_is_an_annotation(name: str) -> None:
    assert allows({"type": "string", "format": name}, "no response format")


def test_a_known_format_is_a_form() -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "ipv4"}}, "required": ["format"]}
    assert allows(schema, {"format": "10.0.0.1"})
    assert not allows(schema, {"format": "home"})


def test_data_is_no_schema() -> None:
    data = {"format": "binary", "propertyNames": 1, "oneOf": [1, 2], "uniqueItems": True}
    assert allows({"const": data}, data)
    check_response_format(ResponseFormat.json_schema({"properties": {name: {"const": 1} for name in data}}))


def test_bytes_and_paths_are_texts() -> None:
    assert allows(Upload.model_json_schema(), {"content": "abc", "path": "/tmp"})


@pytest.mark.parametrize(
    ("names", "good", "bad"),
    [
        ({"enum": ["a", "b"]}, {"b": 1}, {"c": 1}),
        ({"const": "a"}, {"a": 1}, {"b": 1}),
        ({"$ref": "#/$defs/Name"}, {"n": 1}, {"m": 1}),
        ({"pattern": "^x-"}, {"x-1": 1}, {"y": 1}),
        ({"maxLength": 2, "minLength": 1}, {"ab": 1}, {"abc": 1}),
        ({"type": "string"}, {"any": 1}, {"any": 2}),
        (True, {"any": 1}, {"any": 2}),
        (False, {}, {"a": 1}),
    ],
)
def test_names_of_properties_are_kept(names: Any, good: Any, bad: Any) -> None:
    schema = {
        "type": "object",
        "propertyNames": names,
        "additionalProperties": {"const": 1},
        "$defs": {"Name": {"enum": ["n"]}},
    }
    assert allows(schema, good)
    assert not allows(schema, bad)


def test_arrays_of_few_values_do_not_repeat_any() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 1}
    for text in texts_of(schema):
        items = json.loads(text)
        assert 1 <= len(items) == len(set(items))
    assert allows(schema, ["c", "a", "b"])
    assert not allows(schema, ["a", "a"])
    assert not allows(schema, [])


def test_arrays_of_more_values_are_taken() -> None:
    assert allows({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [1, 2])
    assert allows({"type": "array", "items": {"enum": list(range(30))}, "uniqueItems": True}, [1, 2])
    assert allows({"type": "array", "items": {"type": "integer"}, "uniqueItems": False}, [1, 1])


def test_a_property_that_a_list_of_names_has_too_satisfies_both() -> None:
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer", "multipleOf": 5}},
        "patternProperties": {"^score$": {"maximum": 100}, "^(a|b-c)$": {"const": 1}},
        "required": ["score"],
        "additionalProperties": False,
    }
    assert all(json.loads(text)["score"] % 5 == 0 and json.loads(text)["score"] <= 100 for text in texts_of(schema))
    assert allows(schema, {"score": 95, "a": 1, "b-c": 1})
    assert not allows(schema, {"score": 105})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"score": {}}, "patternProperties": {"^s": {}}},
        {"required": ["score"], "patternProperties": {"^s": {}}},
        {"patternProperties": {"^s": {}, "^score$": {}}},
        {"allOf": [{"properties": {"score": {}}}, {"patternProperties": {"ore": {}}}]},
        {"properties": {"score": {}}, "anyOf": [{"patternProperties": {"^s": {}}}]},
        {"properties": {"a": {"items": {"properties": {"score": {}}, "patternProperties": {"^s": {}}}}}},
    ],
)
def test_a_pattern_that_matches_a_property_as_well_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r'patternProperties "[^"]+" that match the property "score" as well'):
        check_response_format(ResponseFormat.json_schema(schema))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("false", "allows nothing"),
        ('{"multipleOf": true}', "multipleOf"),
        ('{"minimum": NaN}', "NaN"),
        ('{"minimum": -Infinity}', "Infinity"),
        ('{"type": "number", "maximum": 1e999}', "1.8e308"),
        ('{"type": "integer", "maximum": ' + "9" * 400 + "}", "1.8e308"),
        ('{"type": "integer", "maximum": ' + "9" * 5000 + "}", "not JSON"),
        ('{"enum": ["\\ud800"]}', "surrogate"),
        ('{"properties": {"\\udfff": {}}}', "surrogate"),
        ('{"type":"array","items":' * 130 + "{}" + "}" * 130, "nested too deeply"),
        ("[" * 30_000 + "]" * 30_000, "nested too deeply"),
        ('{"$ref": "#"}', "needs itself without end"),
        ('{"required": 5}', "cannot be used"),
        ('{"items": {"type": 5}}', "cannot be used"),
        ('{"oneOf": 5, "allOf": 6, "anyOf": {}, "properties": [], "propertyNames": 3}', "cannot be used"),
        ('{"$ref": 5, "uniqueItems": 3, "format": 4, "patternProperties": {"(": {}}}', "cannot be used"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(source: str, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as refused:
        compile_grammar(ResponseFormat(FormatKind.JSON_SCHEMA, source))
    assert refused.value.field == "response_format.json_schema"


ENDLESS = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}}}
N = {"$ref": "#/$defs/n"}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {"type": "object", "properties": {"x": N, "y": {"const": 1}}, "additionalProperties": False},
            {"y": 1},
            {"x": [[]]},
        ),
        ({"anyOf": [N, {"const": 1}]}, 1, [[1]]),
        ({"type": "array", "items": N}, [], [[]]),
        ({"type": "array", "prefixItems": [{"const": 1}, N]}, [1], [1, []]),
        ({"type": "object", "additionalProperties": N}, {}, {"a": []}),
        (
            {"type": ["object", "null"], "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
            {"x": {"x": None}},
            {"x": {}},
        ),
    ],
)
def test_a_part_that_needs_itself_for_ever_is_left_out_where_it_may_be(schema: Any, good: Any, bad: Any) -> None:
    assert allows(schema | ENDLESS, good)
    assert not allows(schema | ENDLESS, bad)
    grammar = compile_grammar(ResponseFormat.json_schema(schema | ENDLESS))
    for seed in range(NUM_WALKS):
        random_text(grammar, seed)


@pytest.mark.parametrize(
    "schema",
    [
        N | ENDLESS,
        {"allOf": [{}, N]} | ENDLESS,
        {"anyOf": [N, N]} | ENDLESS,
        {"type": "array", "items": N, "minItems": 1} | ENDLESS,
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {
            "$defs": {"n": {"anyOf": [{"type": "array", "items": N, "minItems": 1}, {"$ref": "#/$defs/n"}]}},
            "$ref": "#/$defs/n",
        },
    ],
)
def test_a_schema_that_needs_itself_for_ever_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"needs itself without end|[Uu]nsatisfiable"):
        check_response_format(ResponseFormat.json_schema(schema))


def test_a_part_that_refers_to_itself_and_may_end_is_followed() -> None:
    following = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"next": following}, "required": ["next"], "additionalProperties": False}
    assert allows(schema, {"next": {"next": None}})


def test_references_beyond_count_are_not_looked_through() -> None:
    """A chain of them is found from its end, one in each round: what is looked at grows with the
    square of its length.
    """

    class Counted(dict[str, Any]):
        num_asked = 0

        def __contains__(self, key: object) -> bool:
            Counted.num_asked += 1
            return super().__contains__(key)

        def get(self, *args: Any) -> Any:
            Counted.num_asked += 1
            return super().get(*args)

    parts: dict[str, Any] = {f"p{n}": Counted({"$ref": f"p{n + 1}"}) for n in range(2000)} | {"p2000": Counted()}
    endless = {"for ever": {"$ref": "for ever"}}
    assert endless_references(endless, endless.get) == {"for ever"}
    assert endless_references(parts | endless, (parts | endless).get) == frozenset()
    assert Counted.num_asked < 20 * MAX_LOOKED_AT


def test_true_is_any_json() -> None:
    assert allows(True, {"any": ["thing", 1]})


def test_schemas_may_be_nested_a_hundred_levels_deep() -> None:
    check_response_format(ResponseFormat(FormatKind.JSON_SCHEMA, '{"items":' * 90 + "{}" + "}" * 90))


def test_schemas_nested_more_than_a_hundred_levels_deep_are_refused_before_they_are_followed() -> None:
    parse_schema('{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH)
    with pytest.raises(SchemaProblem, match="nested too deeply"):
        parse_schema('{"items":' * (MAX_DEPTH + 1) + "{}" + "}" * (MAX_DEPTH + 1))


def test_patterns_and_names_beyond_count_are_refused_before_they_are_compared() -> None:
    schema: Any = {
        "properties": {f"p{n}": {} for n in range(200)},
        "patternProperties": {f"^{n}x": {} for n in range(200)},
    }
    with pytest.raises(SchemaProblem, match="pairs"):
        adapt_schema(json.dumps(schema))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("^a$", ["a"]),
        ("^(a|b\\.c)$", ["a", "b.c"]),
        ("^(?:x-1|y z)$", ["x-1", "y z"]),
        ("^a|b$", None),
        ("a", None),
        ("^a+$", None),
        ("^(a)b$", None),
    ],
)
def test_patterns_that_are_lists_of_names(pattern: str, names: list[str] | None) -> None:
    assert names_of_pattern(pattern) == names


def test_a_name_is_searched_for_without_looking_for_ever() -> None:
    assert matches_search("(a+)+$", ["b" * 50, "a" * 5000]) == "a" * 5000
    assert matches_search("^(a|a)*$", ["a" * 5000 + "b"]) is None
    assert matches_search('"\\\\', ["é", 'x"\\y']) == 'x"\\y'
    assert matches_search("(", ["("]) is None
