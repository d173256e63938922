"""Converts between values of `kvrelay.core.job` and protocol messages. Checks only enums."""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from google.protobuf.message import Message

from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.job import (
    HASH_BYTES,
    MAX_SHARE_WEIGHT,
    CacheChanges,
    FailureKind,
    FinishReason,
    Job,
    JobId,
    SequenceToken,
    Token,
    TopLogprob,
    WorkerLoad,
)
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.core.sampling_params import PARAMETERS, SamplingDefaults, SamplingParams
from kvrelay.core.trace_context import parse_traceparent
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2

_FINISH_REASONS = {
    FinishReason.STOP: session_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: session_pb2.FINISH_REASON_LENGTH,
}
_FINISH_REASONS_BY_NUMBER = {number: reason for reason, number in _FINISH_REASONS.items()}

_FAILURE_KINDS = {
    FailureKind.OUT_OF_CAPACITY: session_pb2.FAILURE_KIND_OUT_OF_CAPACITY,
    FailureKind.TRANSFER: session_pb2.FAILURE_KIND_TRANSFER,
    FailureKind.DRAINING: session_pb2.FAILURE_KIND_DRAINING,
    FailureKind.INVALID: session_pb2.FAILURE_KIND_INVALID,
    FailureKind.DEADLINE: session_pb2.FAILURE_KIND_DEADLINE,
    FailureKind.INTERNAL: session_pb2.FAILURE_KIND_INTERNAL,
    FailureKind.SUPERSEDED: session_pb2.FAILURE_KIND_SUPERSEDED,
    FailureKind.UNPROVEN: session_pb2.FAILURE_KIND_UNPROVEN,
}
_FAILURE_KINDS_BY_NUMBER = {number: kind for kind, number in _FAILURE_KINDS.items()}


def job_id_to_pb(job_id: JobId) -> session_pb2.JobId:
    return session_pb2.JobId(request_id=job_id.request_id, attempt=job_id.attempt, first_sequence=job_id.first_sequence)


def job_id_from_pb(message: session_pb2.JobId) -> JobId:
    return _job_id(message.request_id, message.attempt, message.first_sequence)


# Every token repeats a few values, and building one takes longer than finding it.
_job_id = lru_cache(maxsize=1024)(JobId)
_plain_token = lru_cache(maxsize=65_536)(Token)


def sampling_to_pb(sampling: SamplingParams, names: Iterable[str] = PARAMETERS) -> session_pb2.SamplingParams:
    """Only these fields are set in the message."""
    values = {name: getattr(sampling, name) for name in names}
    return session_pb2.SamplingParams(**_converted(values, _TO_PB))


def sampling_from_pb(message: session_pb2.SamplingParams) -> SamplingParams:
    """Absent fields get kvrelay's defaults; see `with_model_defaults`. Raises InvalidRequestError."""
    values = {field.name: value for field, value in message.ListFields()}
    for name, value in values.items():
        PARAMETERS[name].check_count(value)
    return SamplingParams(**_converted(values, _FROM_PB))


def with_model_defaults(sampling: SamplingParams, message: Message, model: ModelSpec) -> SamplingParams:
    """Fills fields that the client left open: once, so that each attempt is sampled alike."""
    return model.sampling_defaults.apply(sampling, {field.name for field, _ in message.ListFields()})


def _converted(values: dict[str, Any], conversions: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {name: conversions[name](value) if name in conversions else value for name, value in values.items()}


def _stops_from_pb(stops: Iterable[bytes]) -> tuple[str, ...]:
    return tuple(_stop_from_pb(number, stop) for number, stop in enumerate(stops))


def _stop_from_pb(number: int, stop: bytes) -> str:
    try:
        return stop.decode()
    except UnicodeDecodeError as failure:
        problem = f"is not UTF-8: {failure.reason} at byte {failure.start}; send it as UTF-8"
        raise InvalidRequestError(f"stop[{number}]", problem) from None


def response_format_to_pb(response_format: ResponseFormat | None) -> session_pb2.ResponseFormat | None:
    if response_format is None:
        return None
    return session_pb2.ResponseFormat(**{response_format.kind.value: response_format.source})


def response_format_from_pb(message: session_pb2.ResponseFormat) -> ResponseFormat | None:
    kind = message.WhichOneof("format")
    return None if kind is None else ResponseFormat(FormatKind(kind), getattr(message, kind))


# Other parameters need no conversion.
_TO_PB: dict[str, Callable[[Any], Any]] = {
    "logit_bias": dict,
    "stop": lambda stops: [stop.encode() for stop in stops],
    "response_format": response_format_to_pb,
}
_FROM_PB: dict[str, Callable[[Any], Any]] = {
    "logit_bias": dict,
    "stop": _stops_from_pb,
    "stop_token_ids": tuple,
    "response_format": response_format_from_pb,
}


def token_to_pb(token: Token) -> session_pb2.Token:
    if token.logprob is None:
        return session_pb2.Token(token_id=token.token_id)
    return session_pb2.Token(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[session_pb2.TopLogprob(token_id=top.token_id, logprob=top.logprob) for top in token.top_logprobs],
    )


def token_from_pb(message: session_pb2.Token) -> Token:
    # Most tokens have neither logprob nor alternatives, and this runs for each of them.
    if not message.HasField("logprob"):
        return _plain_token(message.token_id)
    return Token(
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple(TopLogprob(top.token_id, top.logprob) for top in message.top_logprobs),
    )


def finish_reason_to_pb(reason: FinishReason | None) -> "session_pb2.FinishReason.ValueType":
    return session_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_REASONS[reason]


def finish_reason_from_pb(number: "session_pb2.FinishReason.ValueType") -> FinishReason | None:
    return _FINISH_REASONS_BY_NUMBER.get(number)


def sequence_token_to_pb(token: SequenceToken) -> session_pb2.SequenceToken:
    return session_pb2.SequenceToken(
        job_id=job_id_to_pb(token.job_id),
        sequence=token.sequence,
        index=token.index,
        token=token_to_pb(token.token),
        finish_reason=finish_reason_to_pb(token.finish_reason),
    )


def sequence_token_from_pb(message: session_pb2.SequenceToken) -> SequenceToken:
    return SequenceToken(
        job_id_from_pb(message.job_id),
        message.sequence,
        message.index,
        token_from_pb(message.token),
        finish_reason_from_pb(message.finish_reason),
    )


def chunk_time_to_pb(chunk: ChunkTime) -> session_pb2.ChunkTime:
    return session_pb2.ChunkTime(**{name: getattr(chunk, name) for name in ChunkTime.__slots__})


def milliseconds_from_pb(value: float) -> float:
    """Rounds to microseconds: further digits come from the 32 bits on the wire."""
    return round(value, 3)


def chunk_time_from_pb(message: session_pb2.ChunkTime) -> ChunkTime:
    times = {name: milliseconds_from_pb(getattr(message, name)) for name in ("begin_ms", "end_ms")}
    return ChunkTime(**{name: getattr(message, name) for name in ChunkTime.__slots__} | times)


def failure_kind_to_pb(kind: FailureKind) -> "session_pb2.FailureKind.ValueType":
    return _FAILURE_KINDS[kind]


def failure_kind_from_pb(number: "session_pb2.FailureKind.ValueType") -> FailureKind:
    """A kind that this version does not know counts as INTERNAL."""
    return _FAILURE_KINDS_BY_NUMBER.get(number, FailureKind.INTERNAL)


def reserve_to_pb(job: Job, fingerprint: str) -> decode_pb2.Reserve:
    return decode_pb2.Reserve(
        job_id=job_id_to_pb(job.job_id),
        fingerprint=fingerprint,
        token_ids=job.token_ids,
        num_prompt_tokens=job.num_prompt_tokens,
        num_sequences=job.num_sequences,
        sampling=sampling_to_pb(job.sampling),
        cache_salt=job.cache_salt,
        deadline_ms=job.deadline_ms,
        runs_alone=job.isolated,
        traceparent=_traceparent(job),
        share_weight=job.share_weight,
    )


def start_prefill_to_pb(job: Job, ticket: bytes, push_address: str, num_cached_tokens: int) -> prefill_pb2.StartPrefill:
    return prefill_pb2.StartPrefill(
        job_id=job_id_to_pb(job.job_id),
        token_ids=job.token_ids,
        num_prompt_tokens=job.num_prompt_tokens,
        num_sequences=job.num_sequences,
        sampling=sampling_to_pb(job.sampling),
        cache_salt=job.cache_salt,
        deadline_ms=job.deadline_ms,
        ticket=ticket,
        push_address=push_address,
        num_cached_tokens=num_cached_tokens,
        traceparent=_traceparent(job),
        share_weight=job.share_weight,
    )


def _traceparent(job: Job) -> str:
    return "" if job.trace is None else job.trace.traceparent


def job_from_pb(message: decode_pb2.Reserve | prefill_pb2.StartPrefill) -> Job:
    return Job(
        job_id=job_id_from_pb(message.job_id),
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        num_sequences=message.num_sequences,
        sampling=sampling_from_pb(message.sampling),
        cache_salt=message.cache_salt,
        deadline_ms=message.deadline_ms,
        isolated=isinstance(message, decode_pb2.Reserve) and message.runs_alone,
        trace=parse_traceparent(message.traceparent) if message.traceparent else None,
        share_weight=min(max(message.share_weight, 1), MAX_SHARE_WEIGHT),
    )


def model_to_pb(model: ModelSpec) -> session_pb2.ModelInfo:
    layout = model.kv_layout
    return session_pb2.ModelInfo(
        name=model.name,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_context_tokens,
        eos_token_ids=model.eos_token_ids,
        sampling_defaults=session_pb2.SamplingDefaults(**model.sampling_defaults.stated()),
    )


def model_from_pb(message: session_pb2.ModelInfo) -> ModelSpec:
    return ModelSpec(
        name=message.name,
        architecture=message.architecture,
        kv_layout=KVLayout(message.num_layers, message.num_kv_heads, message.head_dim, message.dtype),
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        fingerprint=message.fingerprint,
        sampling_defaults=_defaults_from_pb(message.sampling_defaults),
    )


def _defaults_from_pb(message: session_pb2.SamplingDefaults) -> SamplingDefaults:
    # As people wrote them: the wire's 32-bit floats have 0.6 as 0.60000002.
    return SamplingDefaults(**{field.name: _shortened(value) for field, value in message.ListFields()})


def _shortened(value: Any) -> Any:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def load_to_pb(load: WorkerLoad) -> session_pb2.WorkerLoad:
    return session_pb2.WorkerLoad(**{name: getattr(load, name) for name in WorkerLoad.__slots__})


def load_from_pb(message: session_pb2.WorkerLoad) -> WorkerLoad:
    """Rates that no worker can have measured count as not measured."""
    return WorkerLoad(**{name: _possible(getattr(message, name)) for name in WorkerLoad.__slots__})


def _possible(value: Any) -> Any:
    return 0.0 if isinstance(value, float) and not 0.0 <= value < math.inf else value


def cache_changes_to_pb(changes: CacheChanges) -> session_pb2.CacheChanges:
    return session_pb2.CacheChanges(
        forgets_all=changes.forgets_all, published=b"".join(changes.published), evicted=b"".join(changes.evicted)
    )


def cache_changes_from_pb(message: session_pb2.CacheChanges) -> CacheChanges:
    """Raises InvalidRequestError for what is no list of hashes."""
    return CacheChanges(
        _hashes("published", message.published), _hashes("evicted", message.evicted), message.forgets_all
    )


def _hashes(name: str, joined: bytes) -> tuple[bytes, ...]:
    if len(joined) % HASH_BYTES:
        raise InvalidRequestError(f"cache_changes.{name}", f"must be hashes of {HASH_BYTES} bytes each")
    return tuple(joined[begin : begin + HASH_BYTES] for begin in range(0, len(joined), HASH_BYTES))
