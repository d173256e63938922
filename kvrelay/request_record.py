"""What Redis knows of a request, as plain values, and how they lie in a Redis hash. Knows no connection and no clock."""

import contextlib
import dataclasses
import json
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.errors import InvalidRequestError, UnreadableStateError
from kvrelay.request_state import RequestState
from kvrelay.response_format import FormatKind, ResponseFormat
from kvrelay.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """A request without what only a takeover needs."""

    request_id: str
    state: RequestState
    attempt: int
    """From 1."""
    tenant: str
    model: str
    gateway_id: str
    """Instance id of the gateway that owns it."""
    num_prompt_tokens: int
    create_time_ms: int
    """Wall clock of the admitting gateway, milliseconds since the epoch."""
    update_time_ms: int
    """When the state last changed; Redis's clock."""
    deadline_time_ms: int
    """Wall clock, for people only; programs use `remaining_ms`."""
    remaining_ms: int
    """What was left of the deadline when the record was written or read, by Redis's clock; 0 when it has passed."""
    num_output_tokens: int = 0
    """Tokens emitted so far, over all sequences."""
    prefill_worker_id: str = ""
    """Empty when there is none."""
    decode_worker_id: str = ""
    error_message: str = ""
    """One sentence, when it failed."""
    error_reason: str = ""
    """`KvrelayError.reason` of that error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord(RequestSummary):
    """Enough to take the request over: with the log's frames it continues on any gateway."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    """Resolved: with seed, max_tokens and stop strings."""
    cache_salt: str = ""
    resumable: bool = False


CHANGEABLE_FIELDS = frozenset({"num_output_tokens", "prefill_worker_id", "decode_worker_id", "error_message", "error_reason"})
"""What may change along with a state."""


def encode_record(record: RequestRecord) -> list[str | int | bytes]:
    """Fields and values of a Redis hash, alternating. Times by Redis's clock are left to the script."""
    fields: list[str | int | bytes] = []
    for name in _STORED_FIELDS:
        fields += (name, _encode(getattr(record, name)))
    return fields


def decode_record(stored: Mapping[bytes, bytes], now_ms: int) -> RequestRecord:
    """A whole hash as a record; `now_ms` is Redis's clock.

    Raises:
        UnreadableStateError: it is none.
    """
    with _reading():
        return RequestRecord(
            **_decode_summary(stored, now_ms),
            prompt_token_ids=_decode_token_ids(stored[b"prompt_token_ids"]),
            sampling=_decode_sampling(stored[b"sampling"]),
            cache_salt=stored[b"cache_salt"].decode(),
            resumable=stored[b"resumable"] == b"1",
        )


def decode_summary(values: Sequence[bytes | None], now_ms: int) -> RequestSummary | None:
    """The values of `SUMMARY_FIELDS` as a summary, or None when the hash is gone; `now_ms` is Redis's clock.

    Raises:
        UnreadableStateError: the hash is no request's.
    """
    stored = {name.encode(): value for name, value in zip(SUMMARY_FIELDS, values, strict=True) if value is not None}
    with _reading():
        return RequestSummary(**_decode_summary(stored, now_ms)) if stored else None


def decode_state(stored: bytes) -> RequestState:
    """A state alone.

    Raises:
        UnreadableStateError: it is none.
    """
    with _reading():
        return RequestState(stored.decode())


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What cannot be read may be of any shape, and what reads it raises what Python raises then."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, InvalidRequestError) as error:
        problem = "what the state store holds of the request is not what kvrelay writes; send the request again as a new one"
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
    values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    values["stop"] = tuple(values["stop"])
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    values["response_format"] = _decode_response_format(values.get("response_format"))
    sampling = SamplingParams(**values)
    _check_types(sampling)
    sampling.validate()
    return sampling


def _decode_response_format(stored: dict[str, Any] | None) -> ResponseFormat | None:
    """None also in records of versions that knew no forms."""
    if stored is None:
        return None
    kind, source = FormatKind(stored["kind"]), stored["source"]
    if type(source) is not str:
        raise TypeError("a form's source is no text")
    return ResponseFormat(kind, source)


def _check_types(sampling: SamplingParams) -> None:
    """Raises TypeError for what JSON can say and no sampling has."""
    whole = (sampling.top_k, sampling.seed, sampling.min_tokens, sampling.max_tokens, sampling.n, *sampling.stop_token_ids)
    optional = () if sampling.logprobs is None else (sampling.logprobs,)
    if any(type(number) is not int for number in (*whole, *optional)):
        raise TypeError("a count, seed or token id is no whole number")
    if any(not 0 <= token_id < 2**32 for token_id in (*sampling.logit_bias, *sampling.stop_token_ids)):
        raise ValueError("a token id is none")
    if any(type(stop) is not str for stop in sampling.stop) or type(sampling.ignore_eos) is not bool:
        raise TypeError("a stop string is no text, or a choice is none")


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
_NUMBER_FIELDS = ("attempt", "num_prompt_tokens", "num_output_tokens", "create_time_ms", "update_time_ms", "deadline_time_ms")
MAX_TIME_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, where timestamps end."""
_MAX_NUMBERS = {name: MAX_TIME_MS if name.endswith("_ms") else 2**32 - 1 for name in _NUMBER_FIELDS}
SUMMARY_FIELDS = (*_TEXT_FIELDS, *_NUMBER_FIELDS, "state", "redis_deadline_ms")
"""Names of the hash's fields that a summary is made of."""
_STORED_FIELDS = tuple(
    field.name for field in dataclasses.fields(RequestRecord) if field.name not in ("remaining_ms", "update_time_ms")
)
