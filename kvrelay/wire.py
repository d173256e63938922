"""Conversions between the values of `kvrelay.work` and the messages of the protocol. Pure; checks nothing but enum membership."""

from functools import lru_cache

from kvrelay.chunk_times import ChunkTime
from kvrelay.model_spec import KVLayout, ModelSpec
from kvrelay.response_format import FormatKind, ResponseFormat
from kvrelay.sampling_params import SamplingParams
from kvrelay.trace_context import parse_traceparent
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.work import FailureKind, FinishReason, SequenceToken, Token, TopLogprob, Work, WorkerLoad, WorkId

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
}
_FAILURE_KINDS_BY_NUMBER = {number: kind for kind, number in _FAILURE_KINDS.items()}


def work_id_to_pb(work_id: WorkId) -> session_pb2.WorkId:
    return session_pb2.WorkId(request_id=work_id.request_id, attempt=work_id.attempt, first_sequence=work_id.first_sequence)


def work_id_from_pb(message: session_pb2.WorkId) -> WorkId:
    return _work_id(message.request_id, message.attempt, message.first_sequence)


# The same few come with every token, and to make a frozen value takes longer than to find it.
_work_id = lru_cache(maxsize=1024)(WorkId)
_plain_token = lru_cache(maxsize=65_536)(Token)


def sampling_to_pb(sampling: SamplingParams) -> session_pb2.SamplingParams:
    return session_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop=[stop.encode() for stop in sampling.stop],
        stop_token_ids=sampling.stop_token_ids,
        min_tokens=sampling.min_tokens,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        n=sampling.n,
        response_format=response_format_to_pb(sampling.response_format),
    )


def sampling_from_pb(message: session_pb2.SamplingParams) -> SamplingParams:
    """Absent fields take their defaults.

    Raises:
        UnicodeDecodeError: a stop string is not UTF-8. Gateways check before they call this.
    """
    default = SamplingParams()
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else default.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else default.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else default.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(stop.decode() for stop in message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        n=message.n if message.HasField("n") else default.n,
        response_format=response_format_from_pb(message.response_format) if message.HasField("response_format") else None,
    )


def response_format_to_pb(response_format: ResponseFormat | None) -> session_pb2.ResponseFormat | None:
    if response_format is None:
        return None
    return session_pb2.ResponseFormat(**{response_format.kind.value: response_format.source})


def response_format_from_pb(message: session_pb2.ResponseFormat) -> ResponseFormat | None:
    """None when the message names no form."""
    form = message.WhichOneof("form")
    return None if form is None else ResponseFormat(FormatKind(form), getattr(message, form))


def token_to_pb(token: Token) -> session_pb2.Token:
    if token.logprob is None:
        return session_pb2.Token(token_id=token.token_id)
    return session_pb2.Token(
        token_id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[session_pb2.TopLogprob(token_id=top.token_id, logprob=top.logprob) for top in token.top_logprobs],
    )


def token_from_pb(message: session_pb2.Token) -> Token:
    if not message.HasField("logprob"):  # nor alternatives: so it is with most tokens, and this runs for each of them
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
        work_id=work_id_to_pb(token.work_id),
        sequence=token.sequence,
        index=token.index,
        token=token_to_pb(token.token),
        finish_reason=finish_reason_to_pb(token.finish_reason),
    )


def sequence_token_from_pb(message: session_pb2.SequenceToken) -> SequenceToken:
    return SequenceToken(
        work_id_from_pb(message.work_id),
        message.sequence,
        message.index,
        token_from_pb(message.token),
        finish_reason_from_pb(message.finish_reason),
    )


def chunk_time_to_pb(chunk: ChunkTime) -> session_pb2.ChunkTime:
    return session_pb2.ChunkTime(**{name: getattr(chunk, name) for name in ChunkTime.__slots__})


def chunk_time_from_pb(message: session_pb2.ChunkTime) -> ChunkTime:
    return ChunkTime(**{name: getattr(message, name) for name in ChunkTime.__slots__})


def failure_kind_to_pb(kind: FailureKind) -> "session_pb2.FailureKind.ValueType":
    return _FAILURE_KINDS[kind]


def failure_kind_from_pb(number: "session_pb2.FailureKind.ValueType") -> FailureKind:
    """A kind that this version does not know counts as INTERNAL."""
    return _FAILURE_KINDS_BY_NUMBER.get(number, FailureKind.INTERNAL)


def reserve_to_pb(work: Work, fingerprint: str) -> decode_pb2.Reserve:
    return decode_pb2.Reserve(
        work_id=work_id_to_pb(work.work_id),
        fingerprint=fingerprint,
        token_ids=work.token_ids,
        num_prompt_tokens=work.num_prompt_tokens,
        num_sequences=work.num_sequences,
        sampling=sampling_to_pb(work.sampling),
        cache_salt=work.cache_salt,
        deadline_ms=work.deadline_ms,
        runs_alone=work.runs_alone,
        traceparent=_traceparent(work),
    )


def start_prefill_to_pb(work: Work, ticket: bytes, push_address: str, num_cached_tokens: int) -> prefill_pb2.StartPrefill:
    return prefill_pb2.StartPrefill(
        work_id=work_id_to_pb(work.work_id),
        token_ids=work.token_ids,
        num_prompt_tokens=work.num_prompt_tokens,
        num_sequences=work.num_sequences,
        sampling=sampling_to_pb(work.sampling),
        cache_salt=work.cache_salt,
        deadline_ms=work.deadline_ms,
        ticket=ticket,
        push_address=push_address,
        num_cached_tokens=num_cached_tokens,
        traceparent=_traceparent(work),
    )


def _traceparent(work: Work) -> str:
    return "" if work.trace is None else work.trace.traceparent


def work_from_pb(message: decode_pb2.Reserve | prefill_pb2.StartPrefill) -> Work:
    return Work(
        work_id=work_id_from_pb(message.work_id),
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        num_sequences=message.num_sequences,
        sampling=sampling_from_pb(message.sampling),
        cache_salt=message.cache_salt,
        deadline_ms=message.deadline_ms,
        runs_alone=isinstance(message, decode_pb2.Reserve) and message.runs_alone,
        trace=parse_traceparent(message.traceparent) if message.traceparent else None,
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
    )


def load_to_pb(load: WorkerLoad) -> session_pb2.WorkerLoad:
    return session_pb2.WorkerLoad(**{name: getattr(load, name) for name in WorkerLoad.__slots__})


def load_from_pb(message: session_pb2.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(**{name: getattr(message, name) for name in WorkerLoad.__slots__})
