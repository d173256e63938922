"""Records of requests, and their encoding in a Redis hash."""

import contextlib
import dataclasses
import json
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.core.sampling_params import PARAMETERS, SamplingParams
from kvrelay.errors import InvalidRequestError, UnreadableStateError


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """A request without the fields that only a takeover needs."""

    request_id: str
    state: RequestState
    attempt: int
    """From 1."""
    tenant: str
    model: str
    gateway_id: str
    num_prompt_tokens: int
    create_time_ms: int
    update_time_ms: int
    """Of the last change of state, by Redis's clock."""
    deadline_time_ms: int
    """Wall clock, for people only; programs use `remaining_ms`."""
    remaining_ms: int
    """Time to the deadline at writing or reading, by Redis's clock."""
    num_output_tokens: int = 0
    """Over all sequences."""
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    error_message: str = ""
    error_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord(RequestSummary):
    """With `keeps_output` and the frames of its log, enough to continue it on any gateway."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """Resolved: with seed, max_tokens and stop strings."""
    cache_salt: str = ""
    resumable: bool = False
    keeps_output: bool = True
    """Whether the store gets its content: prompt, sampling and output."""


CHANGEABLE_FIELDS = frozenset(
    {"num_output_tokens", "prefill_worker_id", "decode_worker_id", "error_message", "error_reason"}
)


def encode_record(record: RequestRecord) -> list[str | int | bytes]:
    """Alternating fields and values, without content that no gateway will need.

    The script adds times by Redis's clock.
    """
    if not record.keeps_output or is_terminal(record.state):
        record = dataclasses.replace(record, **_FORGOTTEN)
    fields: list[str | int | bytes] = []
    for name in _STORED_FIELDS:
        fields += (name, _encode(getattr(record, name)))
    return fields


def stored_size(record: RequestRecord) -> int:
    """Approximate, in bytes."""
    values = encode_record(record)
    return sum(len(value) if isinstance(value, str | bytes) else 8 for value in values)


def forgotten_content() -> dict[str, str | int | bytes]:
    """What takes the place of a client's content, once a request has ended."""
    return {name: _encode(value) for name, value in _FORGOTTEN.items()}


def decode_record(stored: Mapping[bytes, bytes], now_ms: int) -> RequestRecord:
    """Raises UnreadableStateError if the hash is not a request's."""
    with _reading():
        return RequestRecord(
            **_decode_summary(stored, now_ms),
            prompt_token_ids=_decode_token_ids(stored[b"prompt_token_ids"]),
            sampling=_decode_sampling(stored[b"sampling"]),
            cache_salt=stored[b"cache_salt"].decode(),
            resumable=stored[b"resumable"] == b"1",
            keeps_output=stored.get(b"keeps_output") != b"0",  # older gateways write none and keep all
        )


def decode_summary(values: Sequence[bytes | None], now_ms: int) -> RequestSummary | None:
    """None when the hash is gone; raises as `decode_record`."""
    stored = {name.encode(): value for name, value in zip(SUMMARY_FIELDS, values, strict=True) if value is not None}
    with _reading():
        return RequestSummary(**_decode_summary(stored, now_ms)) if stored else None


def decode_state(stored: bytes) -> RequestState:
    with _reading():
        return RequestState(stored.decode())


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Turns all that reading an unknown value may raise into UnreadableStateError."""
    try:
        yield
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        InvalidRequestError,
    ) as error:
        problem = (
            "what the state store holds of the request is not what kvrelay writes; send the request again as a new one"
        )
        raise UnreadableStateError(problem) from error


def _decode_summary(stored: Mapping[bytes, bytes], now_ms: int) -> dict[str, Any]:
    texts = {name: stored[name.encode()].decode() for name in _TEXT_FIELDS}
    numbers = {name: _decode_number(stored[name.encode()], _MAX_NUMBERS[name]) for name in _NUMBER_FIELDS}
    remaining_ms = max(0, _decode_number(stored[b"redis_deadline_ms"], MAX_TIME_MS) - now_ms)
    return {**texts, **numbers, "state": RequestState(stored[b"state"].decode()), "remaining_ms": remaining_ms}


def _encode(value: object) -> str | int | bytes:
    match value:
        case bool():
            return int(value)
        case str() | int():
            return value
        case RequestState():
            return value.value
        case SamplingParams():
            return json.dumps(dataclasses.asdict(value), default=_encode_enum)
        case tuple():
            return _little_endian(array("I", value)).tobytes()
    raise TypeError(f"no way to store a {type(value).__name__}")


def _encode_enum(value: object) -> object:
    if isinstance(value, FormatKind):
        return value.value
    raise TypeError(f"no way to store a {type(value).__name__}")


def _decode_number(stored: bytes, maximum: int) -> int:
    number = int(stored)
    if not 0 <= number <= maximum:
        raise ValueError(f"{number} is not between 0 and {maximum}")
    return number


def _decode_token_ids(stored: bytes) -> tuple[int, ...]:
    token_ids = tuple(_little_endian(array("I", stored)))
    if not token_ids:
        raise ValueError("a prompt has at least one token")
    return token_ids


def _little_endian(numbers: "array[int]") -> "array[int]":
    assert numbers.itemsize == 4, "C's unsigned int has four bytes wherever CPython and torch run"
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _decode_sampling(stored: bytes) -> SamplingParams:
    values = json.loads(stored)
    for name, parameter in PARAMETERS.items():
        if name in values and parameter.type in _FROM_JSON:
            values[name] = _FROM_JSON[parameter.type](values[name])
    sampling = SamplingParams(**values)
    sampling.validate()
    if sampling.seed is None or sampling.max_tokens is None:
        raise ValueError("seed and max_tokens are resolved before a record is written")
    return sampling


def _decode_biases(stored: Mapping[str, float]) -> dict[int, float]:
    return {int(token_id): bias for token_id, bias in stored.items()}


def _decode_response_format(stored: Mapping[str, str] | None) -> ResponseFormat | None:
    return None if stored is None else ResponseFormat(FormatKind(stored["kind"]), stored["source"])


_FROM_JSON: dict[Any, Callable[[Any], Any]] = {
    tuple[str, ...]: tuple,
    tuple[int, ...]: tuple,
    Mapping[int, float]: _decode_biases,
    ResponseFormat | None: _decode_response_format,
}
"""By a sampling parameter's type, where JSON has another one."""

# Gateways of older versions read no record without a prompt.
_FORGOTTEN: dict[str, Any] = {"prompt_token_ids": (0,), "sampling": SamplingParams(seed=0, max_tokens=1)}

_TEXT_FIELDS = (
    "request_id",
    "tenant",
    "model",
    "gateway_id",
    "prefill_worker_id",
    "decode_worker_id",
    "error_message",
    "error_reason",
)
_NUMBER_FIELDS = (
    "attempt",
    "num_prompt_tokens",
    "num_output_tokens",
    "create_time_ms",
    "update_time_ms",
    "deadline_time_ms",
)
MAX_TIME_MS = 253_402_300_799_999  # the end of the year 9999, where timestamps end
_MAX_NUMBERS = {name: MAX_TIME_MS if name.endswith("_ms") else 2**32 - 1 for name in _NUMBER_FIELDS}
SUMMARY_FIELDS = (*_TEXT_FIELDS, *_NUMBER_FIELDS, "state", "redis_deadline_ms")
_STORED_FIELDS = tuple(
    field.name for field in dataclasses.fields(RequestRecord) if field.name not in ("remaining_ms", "update_time_ms")
)
