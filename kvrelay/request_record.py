"""What Redis knows of a request, as plain values, and how they lie in a Redis hash. Knows no connection and no clock."""

import dataclasses
import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.request_state import RequestState
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
    """A whole hash as a record; `now_ms` is Redis's clock."""
    return RequestRecord(
        **_decode_summary(stored, now_ms),
        prompt_token_ids=_decode_token_ids(stored[b"prompt_token_ids"]),
        sampling=_decode_sampling(stored[b"sampling"]),
        cache_salt=stored[b"cache_salt"].decode(),
        resumable=stored[b"resumable"] == b"1",
    )


def decode_summary(values: Sequence[bytes | None], now_ms: int) -> RequestSummary | None:
    """The values of `SUMMARY_FIELDS` as a summary, or None when the hash is gone; `now_ms` is Redis's clock."""
    stored = {name.encode(): value for name, value in zip(SUMMARY_FIELDS, values, strict=True) if value is not None}
    return RequestSummary(**_decode_summary(stored, now_ms)) if stored else None


def _decode_summary(stored: Mapping[bytes, bytes], now_ms: int) -> dict[str, Any]:
    texts = {name: stored[name.encode()].decode() for name in _TEXT_FIELDS}
    numbers = {name: int(stored[name.encode()]) for name in _NUMBER_FIELDS}
    remaining_ms = max(0, int(stored[b"redis_deadline_ms"]) - now_ms)
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
            return json.dumps(dataclasses.asdict(value))
        case tuple():
            return _little_endian(array("I", value)).tobytes()
    raise TypeError(f"no way to store a {type(value).__name__}")


def _decode_token_ids(stored: bytes) -> tuple[int, ...]:
    return tuple(_little_endian(array("I", stored)))


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
    return SamplingParams(**values)


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
SUMMARY_FIELDS = (*_TEXT_FIELDS, *_NUMBER_FIELDS, "state", "redis_deadline_ms")
"""Names of the hash's fields that a summary is made of."""
_STORED_FIELDS = tuple(
    field.name for field in dataclasses.fields(RequestRecord) if field.name not in ("remaining_ms", "update_time_ms")
)
