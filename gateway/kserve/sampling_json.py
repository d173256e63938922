"""Sampling parameters written in JSON, under the names of the fields of the proto's SamplingParams. Checks no ranges."""

import json
from collections.abc import Callable
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from gateway.kserve.model_description import SAMPLING_PARAMETERS
from gateway.kserve.quoting import quoted, shortened
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import session_pb2

_FIELDS = session_pb2.SamplingParams.DESCRIPTOR.fields_by_name
_INTEGER_BITS = {FieldDescriptor.TYPE_UINT32: 32, FieldDescriptor.TYPE_UINT64: 64}
_NUMBERS = {FieldDescriptor.TYPE_FLOAT, *_INTEGER_BITS}


def parse_sampling_json(text: str) -> session_pb2.SamplingParams:
    """The message that the JSON stands for. Absent fields and those that are null keep their defaults.

    Raises:
        InvalidRequestError: it is no JSON object, or has a field that is unknown or of a wrong type. Names the field.
    """
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
    assert field.message_type is not None, "a map"
    key_field, value_field = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for key, element in value.items():
        target[_scalar(f"{field.name}[{key}]", key_field.type, key)] = _scalar(f"{field.name}[{key}]", value_field.type, element)


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
    """A number; Triton's example clients write numbers as texts."""
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
    except (OverflowError, ValueError):  # infinity and the like
        pass
    return _refuse(name, f"is {quoted(value)}; it {wanted}")


def _number_in(text: str) -> Any:
    """The number that the text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # half a pair of surrogates becomes bytes that are refused as no UTF-8


_OTHERS: dict[int, tuple[type, Callable[[Any], Any]]] = {
    FieldDescriptor.TYPE_BOOL: (bool, bool),
    FieldDescriptor.TYPE_BYTES: (str, _encode),
}


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequestError(f"{SAMPLING_PARAMETERS}.{shortened(name)}", problem)
