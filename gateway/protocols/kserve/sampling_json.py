"""Parses sampling parameters in JSON, with the proto's field names. Checks no ranges."""

import json
from collections.abc import Callable, Sized
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from gateway.protocols.kserve.model_description import SAMPLING_PARAMETERS
from kvrelay.core.bounds import check_length
from kvrelay.core.quoting import quoted, shortened
from kvrelay.core.sampling_params import PARAMETERS
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import session_pb2

_FIELDS = session_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_INTEGER_BITS = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}
_NUMBERS = {FieldDescriptor.TYPE_FLOAT, *_INTEGER_BITS}
MAX_JSON_BYTES = 256 * 1024
"""A response format, of which each byte may be escaped, and all other parameters."""


def parse_sampling_json(text: str) -> session_pb2.SamplingParams:
    """Absent and null fields keep their defaults.

    Raises:
        InvalidRequestError: the text is no JSON object, or a field is wrong.
    """
    check_length(SAMPLING_PARAMETERS, text, MAX_JSON_BYTES)
    sampling = session_pb2.SamplingParams()
    for name, value in _load(text).items():
        if name not in _FIELDS:
            _refuse(name, f"is not known; these are: {', '.join(sorted(_FIELDS))}")
        if value is not None:
            _set(sampling, _FIELDS[name], value)
    return sampling


def _load(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as failure:
        raise InvalidRequestError(SAMPLING_PARAMETERS, f"is not JSON: {shortened(str(failure))}") from None
    if not isinstance(values, dict):
        raise InvalidRequestError(SAMPLING_PARAMETERS, 'is JSON, but no object; send one such as {"max_tokens": 100}')
    return values


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands there twice")
    return values


def _set(sampling: session_pb2.SamplingParams, field: FieldDescriptor, value: Any) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _set_map(getattr(sampling, field.name), field, value)
    elif field.is_repeated:
        values = value if isinstance(value, list) else [value]
        _check_count(field.name, values)
        getattr(sampling, field.name).extend(
            _scalar(f"{field.name}[{number}]", field.type, element) for number, element in enumerate(values)
        )
    elif field.message_type is not None:
        _set_message(getattr(sampling, field.name), field.name, value)
    else:
        setattr(sampling, field.name, _scalar(field.name, field.type, value))


def _set_map(target: Any, field: FieldDescriptor, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(field.name, "is no JSON object")
    _check_count(field.name, value)
    assert field.message_type is not None, "a map"
    key_field, value_field = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for key, element in value.items():
        target[_scalar(f"{field.name}[{shortened(key)}]", key_field.type, key)] = _scalar(
            f"{field.name}[{shortened(key)}]", value_field.type, element
        )


def _check_count(name: str, entries: Sized) -> None:
    try:
        PARAMETERS[name].check_count(entries)
    except InvalidRequestError as failure:
        _refuse(name, failure.problem)


def _set_message(target: Any, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        _refuse(name, "is no JSON object")
    try:
        json_format.ParseDict(value, target)
    except (json_format.ParseError, RecursionError) as failure:
        _refuse(name, f"is not as its proto says: {shortened(str(failure))}")
    target.SetInParent()


def _scalar(name: str, kind: int, value: Any) -> Any:
    if kind in _NUMBERS:
        return _number(name, kind, value)
    wanted, convert = _OTHERS[kind]
    if not isinstance(value, wanted):
        _refuse(name, f"is {quoted(value)}; it must be a {'text' if wanted is str else 'truth value, true or false'}")
    return convert(value)


def _number(name: str, kind: int, value: Any) -> float | int:
    """Triton's example clients write numbers as texts."""
    bits = _INTEGER_BITS.get(kind)
    wanted = f"must be an integer from 0 to {2**bits - 1}" if bits else "must be a number"
    if isinstance(value, str):
        value = _number_in(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, f"is {quoted(value)}; it {wanted}")
    try:
        if bits is None:
            return float(value)
        if value == int(value) and 0 <= value < 2**bits:
            return int(value)
    except (OverflowError, ValueError):  # such as infinity
        pass
    return _refuse(name, f"is {quoted(value)}; it {wanted}")


def _number_in(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _encode(text: str) -> bytes:
    # A lone surrogate becomes invalid UTF-8, which is refused later.
    return text.encode(errors="surrogatepass")


_OTHERS: dict[int, tuple[type, Callable[[Any], Any]]] = {
    FieldDescriptor.TYPE_BOOL: (bool, bool),
    FieldDescriptor.TYPE_BYTES: (str, _encode),
}


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequestError(f"{SAMPLING_PARAMETERS}.{shortened(name)}", problem)
