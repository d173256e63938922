"""Finds the references of a JSON schema to parts without a finite instance. Pure.

    {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1}}, ...}

llguidance would follow such a part until max_tokens. Found like the productive symbols of a
context-free grammar.
"""

from collections.abc import Callable, Iterator
from typing import Any

MAX_LOOKED_AT = 100_000
"""Parts, some tens of milliseconds. Beyond it, no reference counts as endless."""
NESTED_TYPES = frozenset(("object", "array"))


class _TooManyError(Exception):
    """More than `MAX_LOOKED_AT`."""


def endless_references(root: Any, target_of: Callable[[str], Any]) -> frozenset[str]:
    """`target_of` says where a reference leads; None if unknown."""
    targets = {reference: target for reference in _references(root) if (target := target_of(reference)) is not None}
    instances = _Instances(set(targets))
    try:
        while found := [name for name in instances.unknown if instances.has_one(targets[name])]:
            instances.unknown.difference_update(found)
    except _TooManyError:
        return frozenset()
    return frozenset(instances.unknown)


def _references(schema: Any) -> Iterator[str]:
    left = [schema]
    while left:
        match left.pop():
            case dict() as members:
                left.extend(members.values())
                if isinstance(members.get("$ref"), str):
                    yield members["$ref"]
            case list() as items:
                left.extend(items)


class _Instances:
    """Whether schemas have an instance while references in `unknown` have none."""

    def __init__(self, unknown: set[str]) -> None:
        self.unknown = unknown
        self._num_looked_at = 0

    def has_one(self, schema: Any) -> bool:
        """True for what is no schema, because llguidance refuses it."""
        self._num_looked_at += 1
        if self._num_looked_at > MAX_LOOKED_AT:
            raise _TooManyError
        if not isinstance(schema, dict):
            return schema is not False
        if isinstance(schema.get("$ref"), str) and schema["$ref"] in self.unknown:
            return False
        if not all(self.has_one(part) for part in _list(schema, "allOf")):
            return False
        for keyword in ("anyOf", "oneOf"):
            alternatives = _list(schema, keyword)
            if alternatives and not any(self.has_one(alternative) for alternative in alternatives):
                return False
        return "enum" in schema or "const" in schema or self._has_one_of_its_types(schema)

    def _has_one_of_its_types(self, schema: dict[str, Any]) -> bool:
        given = schema.get("type")
        types = (
            {given}
            if isinstance(given, str)
            else {name for name in given or () if isinstance(name, str)}
            if given
            else set()
        )
        if not types or not types <= NESTED_TYPES:
            return True
        return ("object" in types and self._has_object(schema)) or ("array" in types and self._has_array(schema))

    def _has_object(self, schema: dict[str, Any]) -> bool:
        properties = schema.get("properties")
        given = properties if isinstance(properties, dict) else {}
        others = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        return all(self.has_one(given.get(name, others)) for name in required)

    def _has_array(self, schema: dict[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        if not isinstance(least, int) or least <= 0:
            return True
        first = _list(schema, "prefixItems") or _list(schema, "items")
        rest = schema.get("items" if not isinstance(schema.get("items"), list) else "additionalItems", True)
        return all(self.has_one(item) for item in first[:least]) and (len(first) >= least or self.has_one(rest))


def _list(schema: dict[str, Any], keyword: str) -> list[Any]:
    items = schema.get(keyword)
    return items if isinstance(items, list) else []
