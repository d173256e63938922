"""Rewrites a client's JSON schema for llguidance. Every instance satisfies the client's. Pure.

    the client's                                  the rewritten
    ------------------------------------------    ----------------------------------------
    true                                          {}
    an unknown `format`                           left away: an annotation
    oneOf with a tag that tells alternatives      each alternative requires the tag, so
    apart                                         they exclude each other
    propertyNames: given names, or a pattern      properties, or patternProperties
    uniqueItems over few values                   the arrays themselves
    properties that patternProperties match too   properties of both schemas
    a $ref to what needs itself endlessly         false

llguidance refuses the rest by name.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvrelay.structured_output.schema_instances import endless_references
from kvrelay.structured_output.schema_patterns import matches_search, names_of_pattern
from kvrelay.structured_output.schema_source import MAX_DEPTH, SchemaProblem, check_multiples, parse_schema

MAX_UNIQUE_ARRAYS = 1000
MAX_HELD_TOGETHER = 100
MAX_PATTERN_CHECKS = 5000
ENFORCED_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
DATA_KEYWORDS = frozenset(("enum", "const", "default", "examples"))
SCHEMA_KEYWORDS = (
    "items",
    "additionalItems",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
LIST_KEYWORDS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
MAP_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = dict[str, Any]


def adapt_schema(source: str) -> Schema:
    """Raises SchemaProblem when the text is no schema, allows nothing, or cannot be followed."""
    schema = parse_schema(source)
    if schema is True:
        return {}
    if schema is False:
        raise SchemaProblem("is false, which allows nothing; send a schema that something satisfies")
    if not isinstance(schema, dict):
        raise SchemaProblem('is no schema; a JSON schema is an object such as {"type": "object"}')
    check_multiples(schema)
    adapted: Schema | bool = _Adaptation(schema).adapted(schema)
    if isinstance(adapted, bool):
        raise SchemaProblem(
            "needs itself without end, so nothing satisfies it; leave that part away, or let it be null as well"
        )
    return adapted


class _Adaptation:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._endless = endless_references(root, self._target)

    def adapted(self, schema: Any) -> Any:
        """Leaves what is no schema, for llguidance to refuse."""
        if not isinstance(schema, dict):
            return schema
        if isinstance(schema.get("$ref"), str) and schema["$ref"] in self._endless:
            return False
        self._check_merged(schema)
        adapted = dict(schema)
        rewrite: Callable[[Schema], Schema | None]
        for rewrite in (
            _drop_annotation,
            self._require_tag,
            self._name_properties,
            self._merge_patterns,
            self._write_out_arrays,
        ):
            adapted = rewrite(adapted) or adapted
        for keyword in SCHEMA_KEYWORDS:
            if keyword in adapted:
                adapted[keyword] = self.adapted(adapted[keyword])
        for keyword in LIST_KEYWORDS:
            if isinstance(adapted.get(keyword), list):
                adapted[keyword] = [self.adapted(item) for item in adapted[keyword]]
        for keyword in MAP_KEYWORDS:
            if isinstance(adapted.get(keyword), dict):
                adapted[keyword] = {name: self.adapted(member) for name, member in adapted[keyword].items()}
        return adapted

    def _resolved(self, schema: Any) -> Schema:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            schema = self._target(reference)
        return {}

    def _target(self, reference: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            return None
        target: Any = self._root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            target = target.get(name) if isinstance(target, dict) else None
        return target

    # Tagged unions

    def _require_tag(self, schema: Schema) -> Schema | None:
        """Makes each alternative require the property that tells them apart: Pydantic's tags have
        defaults.
        """
        alternatives = schema.get("oneOf")
        if not isinstance(alternatives, list) or len(alternatives) < 2:
            return None
        tag = self._tag_of(schema, alternatives)
        if tag is None:
            return None
        required = {"type": "object", "required": [tag]}
        return schema | {"oneOf": [{"allOf": [alternative, required]} for alternative in alternatives]}

    def _tag_of(self, schema: Schema, alternatives: list[Any]) -> str | None:
        resolved = [self._resolved(alternative) for alternative in alternatives]
        names = list(_members(resolved[0], "properties"))
        discriminator = schema.get("discriminator")
        named = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        for name in sorted(names, key=lambda name: name != named):
            values = [self._texts_of(_members(alternative, "properties").get(name)) for alternative in resolved]
            known = [texts for texts in values if texts]
            if len(known) == len(values) and sum(map(len, known)) == len(frozenset(itertools.chain(*known))):
                return name
        return None

    def _texts_of(self, schema: Any) -> list[str] | None:
        resolved = self._resolved(schema)
        values = resolved.get("enum", [resolved["const"]] if "const" in resolved else None)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return None
        return list(dict.fromkeys(values))

    # Names of properties

    def _name_properties(self, schema: Schema) -> Schema | None:
        """Returns None where propertyNames cannot be said otherwise."""
        if "propertyNames" not in schema:
            return None
        names, rest = schema["propertyNames"], {key: value for key, value in schema.items() if key != "propertyNames"}
        if names is False:
            return rest | {"properties": {}, "patternProperties": {}, "additionalProperties": False}
        resolved = self._resolved(names)
        says = {key for key in resolved if key not in ("title", "description", "type", "$comment", *DATA_KEYWORDS)}
        if names is not True and resolved.get("type", "string") != "string":
            return None
        if names is True or (isinstance(names, dict) and not says and not {"enum", "const"} & resolved.keys()):
            return rest
        texts = self._texts_of(names)
        if texts is not None and not says and not schema.get("patternProperties"):
            others, given = schema.get("additionalProperties", True), _members(schema, "properties")
            return rest | {
                "properties": {text: given.get(text, others) for text in texts},
                "additionalProperties": False,
            }
        pattern = _pattern_of_names(resolved, says)
        if pattern is None or schema.get("properties") or schema.get("patternProperties"):
            return None
        return rest | {
            "patternProperties": {pattern: schema.get("additionalProperties", True)},
            "additionalProperties": False,
        }

    def _merge_patterns(self, schema: Schema) -> Schema | None:
        """Moves patterns of given names into `properties`."""
        patterns = _members(schema, "patternProperties")
        if not patterns:
            return None
        properties = dict(_members(schema, "properties"))
        left = {}
        for pattern, also in patterns.items():
            names = names_of_pattern(pattern)
            if names is None:
                left[pattern] = also
            for name in names or ():
                properties[name] = {"allOf": [properties[name], also]} if name in properties else also
        required = schema.get("required")
        _refuse_overlap(left, [*properties, *(required if isinstance(required, list) else ())])
        merged = schema | {"properties": properties, "patternProperties": left}
        if not left:
            del merged["patternProperties"]
        return merged

    def _check_merged(self, schema: Schema) -> None:
        together = self._held_together(schema)
        for keyword in ("anyOf", "oneOf"):
            for alternative in schema.get(keyword) or () if isinstance(schema.get(keyword), list) else ():
                _refuse_overlap_of([*together, *self._held_together(alternative)])
        _refuse_overlap_of(together)

    def _held_together(self, schema: Any) -> list[Schema]:
        found: list[Schema] = []
        left = [schema]
        while left and len(found) < MAX_HELD_TOGETHER:
            part = left.pop()
            if not isinstance(part, dict) or any(part is other for other in found):
                continue
            found.append(part)
            if isinstance(part.get("$ref"), str):
                left.append(self._target(part["$ref"]))
            if isinstance(part.get("allOf"), list):
                left.extend(part["allOf"])
        return found

    # Arrays of different items

    def _write_out_arrays(self, schema: Schema) -> Schema | None:
        if "uniqueItems" not in schema or not isinstance(schema["uniqueItems"], bool):
            return None
        rest = {key: value for key, value in schema.items() if key != "uniqueItems"}
        most, least = schema.get("maxItems"), schema.get("minItems", 0)
        if not schema["uniqueItems"] or (isinstance(most, int) and most <= 1):
            return rest
        values = self._values_of(schema.get("items"))
        if (
            values is None
            or schema.get("type", "array") != "array"
            or schema.get("prefixItems")
            or not isinstance(least, int)
        ):
            return rest
        most = min(most, len(values)) if isinstance(most, int) else len(values)
        arrays = list(_arrays_of(values, least, most))
        if not arrays:
            raise SchemaProblem(
                "has uniqueItems with minItems above the number of values that there are; make it smaller"
            )
        if len(arrays) > MAX_UNIQUE_ARRAYS:
            return rest
        kept = {
            key: value
            for key, value in rest.items()
            if key in ("title", "description", "$defs", "definitions", "default")
        }
        return kept | {"enum": arrays}

    def _values_of(self, schema: Any) -> list[Any] | None:
        resolved = self._resolved(schema)
        if {"allOf", "anyOf", "oneOf", "not"} & resolved.keys():
            return None
        if resolved.get("type") == "boolean":
            return [False, True]
        values = resolved.get("enum", [resolved["const"]] if "const" in resolved else None)
        if not isinstance(values, list):
            return None
        kept: dict[str, Any] = {json.dumps(value, sort_keys=True): value for value in values}
        return list(kept.values())


def _refuse_overlap_of(parts: list[Schema]) -> None:
    patterns = {pattern: None for part in parts for pattern in _members(part, "patternProperties")}
    if patterns and len(parts) > 1:
        _refuse_overlap(patterns, [name for part in parts for name in _members(part, "properties")])


def _refuse_overlap(patterns: Iterable[str], names: Iterable[object]) -> None:
    """llguidance follows only one of the two, and may reach a dead end."""
    texts = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    given = list(patterns)
    if len(texts) * len(given) > MAX_PATTERN_CHECKS:
        raise SchemaProblem(
            f"has more than {MAX_PATTERN_CHECKS:,} pairs of properties and patternProperties; have fewer"
        )
    for pattern in given:
        if matched := matches_search(pattern, texts):
            raise SchemaProblem(
                f"has patternProperties {json.dumps(pattern)[:100]} that match the property "
                f"{json.dumps(matched)[:100]} as well; let the pattern match other names only, or leave it away"
            )


def _arrays_of(values: list[Any], least: int, most: int) -> Iterator[list[Any]]:
    lengths = range(max(least, 0), most + 1)
    arrays = itertools.chain.from_iterable(itertools.permutations(values, length) for length in lengths)
    return (list(array) for array in itertools.islice(arrays, MAX_UNIQUE_ARRAYS + 1))


def _drop_annotation(schema: Schema) -> Schema | None:
    name = schema.get("format")
    if not isinstance(name, str) or name in ENFORCED_FORMATS:
        return None
    return {key: value for key, value in schema.items() if key != "format"}


def _pattern_of_names(names: Schema, says: set[str]) -> str | None:
    if says == {"pattern"} and isinstance(names["pattern"], str):
        return str(names["pattern"])
    if says and says <= {"minLength", "maxLength"} and all(type(names[keyword]) is int for keyword in says):
        return f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None


def _members(schema: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    members = schema.get(keyword)
    return members if isinstance(members, dict) else {}
