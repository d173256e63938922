"""Parses a JSON schema, and refuses what no grammar can follow. Pure."""

import json
from collections.abc import Iterator
from fractions import Fraction
from math import isfinite, lcm
from typing import Any

MAX_DEPTH = 100
MAX_MULTIPLE = 10_000
"""llguidance builds n states for multiples of n, whatever its limits say."""


class SchemaProblem(Exception):
    """A sentence that continues the name of the schema's field."""


def parse_schema(source: str) -> object:
    try:
        schema = json.loads(source, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise SchemaProblem(f"is not JSON: {error}; send the schema as JSON text") from None
    left: list[tuple[object, int]] = [(schema, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        match value:
            case dict():
                for name, member in value.items():
                    _check_text(name)
                    left.append((member, depth + 1))
            case list():
                left.extend((item, depth + 1) for item in value)
            case str():
                _check_text(value)
            case int() | float():
                _check_number(value)
    return schema


def _refuse_constant(name: str) -> None:
    raise SchemaProblem(f"has {name}, which is no number of JSON; leave it away")


def _too_deep() -> SchemaProblem:
    return SchemaProblem(f"is nested too deeply: more than {MAX_DEPTH} levels; move inner schemas to $defs")


def _check_text(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SchemaProblem("has half of a surrogate pair, such as \\ud800, which is no text; leave it away")


def _check_number(value: int | float) -> None:
    try:
        is_fit = isfinite(value)
    except OverflowError:
        is_fit = False
    if not is_fit:
        raise SchemaProblem(
            "has a number beyond 1.8e308, which cannot be compared with; leave it away, or make it smaller"
        )


def check_multiples(schema: dict[str, Any]) -> None:
    """allOf may combine them, so bounds their least common multiple."""
    multiples = [Fraction(str(value)) for value in _multiples(schema) if value]
    scale = lcm(*(multiple.denominator for multiple in multiples))
    if lcm(*(abs(int(multiple * scale)) for multiple in multiples)) > MAX_MULTIPLE:
        raise SchemaProblem(
            f"has multipleOf whose least common multiple is above {MAX_MULTIPLE:,}; "
            "leave it away, and check numbers yourself"
        )


def _multiples(schema: object) -> Iterator[int | float]:
    left = [schema]
    while left:
        match left.pop():
            case dict() as members:
                left.extend(members.values())
                multiple = members.get("multipleOf")
                if isinstance(multiple, int | float) and not isinstance(multiple, bool):
                    yield multiple
            case list() as items:
                left.extend(items)
