"""Builds the messages that both clients send.

Values that no message can hold raise the gateway's InvalidRequestError. The gateway checks the
rest.
"""

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from kvrelay.client.results import ChatMessage
from kvrelay.config.settings import MAX_COALESCE_MS
from kvrelay.core.response_format import ResponseFormat
from kvrelay.core.sampling_params import DEFAULTED_PARAMETERS, PARAMETERS, SamplingParams
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.wire import convert

Message = ChatMessage | Mapping[str, str]
"""Also as {"role": ..., "content": ...}."""


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingParams` as keyword arguments. None: not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | Iterable[str]
    stop_token_ids: int | Iterable[int]
    min_tokens: int
    max_tokens: int | None
    ignore_eos: bool
    logprobs: int | None
    n: int
    response_format: ResponseFormat | None


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of `Client.generate`."""

    messages: Iterable[Message] | None
    token_ids: Sequence[int] | None
    model: str
    tenant: str
    resumable: bool
    idempotency_key: str | None
    coalesce_ms: int | None
    timeout_s: float | None


def prompt_field(
    prompt: str | None, messages: Iterable[Message] | None, token_ids: Sequence[int] | None
) -> dict[str, str | inference_pb2.ChatMessages | inference_pb2.TokenIds]:
    """Returns the GenerateRequest field of the prompt. Exactly one argument is given."""
    if sum(kind is not None for kind in (prompt, messages, token_ids)) != 1:
        raise InvalidRequestError("prompt", "must be given as exactly one of: prompt, messages, token_ids")
    if prompt is not None:
        return {"text": _utf8("prompt", prompt)}
    if messages is not None:
        return {"chat": inference_pb2.ChatMessages(messages=chat_messages(messages))}
    return {"token_ids": inference_pb2.TokenIds(ids=_token_ids(token_ids or ()))}


def generate_request(
    prompt: Mapping[str, Any],
    *,
    model: str,
    tenant: str,
    resumable: bool,
    idempotency_key: str | None,
    coalesce_ms: int | None,
    sampling: SamplingOptions,
) -> inference_pb2.GenerateRequest:
    """`prompt` comes from `prompt_field`. Raises TypeError for an unknown sampling parameter."""
    if idempotency_key is None and resumable:
        # It finds the request again if the stream breaks before the request's id arrives.
        idempotency_key = uuid.uuid4().hex
    return inference_pb2.GenerateRequest(
        **prompt,
        model=model,
        tenant=tenant,
        resumable=resumable,
        idempotency_key=idempotency_key or "",
        coalesce_ms=_coalesce_ms(coalesce_ms),
        sampling=sampling_message(sampling),
    )


def generate_again(request: inference_pb2.GenerateRequest, seed: int) -> inference_pb2.GenerateRequest:
    """The same request with the seed that the gateway drew for it.

    With a seed the body differs, so it needs another idempotency key, derived from key and seed.
    """
    if request.sampling.HasField("seed"):
        return request
    again = inference_pb2.GenerateRequest()
    again.CopyFrom(request)
    again.sampling.seed = seed
    if request.idempotency_key:
        again.idempotency_key = hashlib.sha256(f"{request.idempotency_key} {seed}".encode()).hexdigest()
    return again


def converse_request(
    messages: str | Iterable[Message],
    *,
    model: str,
    tenant: str,
    sampling: SamplingOptions,
    timeout_ms: int,
    coalesce_ms: int | None,
) -> inference_pb2.ConverseRequest:
    """One turn. Without sampling parameters, those of the last turn hold."""
    if isinstance(messages, str):
        messages = [ChatMessage("user", messages)]
    return inference_pb2.ConverseRequest(
        messages=chat_messages(messages),
        model=model,
        tenant=tenant,
        sampling=sampling_message(sampling) if sampling else None,
        timeout_ms=timeout_ms,
        coalesce_ms=_coalesce_ms(coalesce_ms),
    )


def resume_request(request_id: str, from_index: int, coalesce_ms: int | None) -> inference_pb2.ResumeRequest:
    return inference_pb2.ResumeRequest(
        request_id=request_id, from_index=from_index, coalesce_ms=_coalesce_ms(coalesce_ms)
    )


def tokenize_request(text: str | None, messages: Iterable[Message] | None, model: str) -> inference_pb2.TokenizeRequest:
    """Exactly one of text and messages is given."""
    if (text is None) == (messages is None):
        raise InvalidRequestError("text", "must be given as exactly one of: text, messages")
    if text is not None:
        return inference_pb2.TokenizeRequest(model=model, text=_utf8("text", text))
    chat = inference_pb2.ChatMessages(messages=chat_messages(messages or ()))
    return inference_pb2.TokenizeRequest(model=model, chat=chat)


def detokenize_request(
    token_ids: Iterable[int], model: str, keep_special_tokens: bool
) -> inference_pb2.DetokenizeRequest:
    return inference_pb2.DetokenizeRequest(
        model=model, token_ids=_token_ids(token_ids), keep_special_tokens=keep_special_tokens
    )


def chat_messages(messages: Iterable[Message]) -> list[inference_pb2.ChatMessage]:
    return [_chat_message(number, message) for number, message in enumerate(messages)]


def sampling_message(sampling: SamplingOptions) -> session_pb2.SamplingParams:
    """Omits parameters that the model's defaults fill in. Raises TypeError for an unknown one."""
    values: dict[str, Any] = {
        name: value for name, value in sampling.items() if value is not None or name not in DEFAULTED_PARAMETERS
    }
    for name, value in values.items():
        if name in PARAMETERS and isinstance(PARAMETERS[name].default, tuple):
            values[name] = (value,) if isinstance(value, str | int) else tuple(value)
    params = SamplingParams(**values)
    try:
        params.validate()
        return convert.sampling_to_pb(
            params, [name for name in PARAMETERS if name in values or name not in DEFAULTED_PARAMETERS]
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("sampling", f"has a value that cannot be sent: {error}") from None


def _chat_message(number: int, message: Message) -> inference_pb2.ChatMessage:
    if isinstance(message, ChatMessage):
        message = {"role": message.role, "content": message.content}
    missing = {"role", "content"} - message.keys()
    if missing:
        raise InvalidRequestError(f"messages[{number}]", f"has no {min(missing)}")
    return inference_pb2.ChatMessage(
        role=_utf8(f"messages[{number}].role", message["role"]),
        content=_utf8(f"messages[{number}].content", message["content"]),
    )


def _token_ids(token_ids: Iterable[int]) -> list[int]:
    ids = list(token_ids)
    for number, token_id in enumerate(ids):
        if not 0 <= token_id < 2**32:
            raise InvalidRequestError(
                f"token_ids[{number}]", f"is {token_id}; it must be an id of the model's vocabulary"
            )
    return ids


def _coalesce_ms(value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MAX_COALESCE_MS:
        raise InvalidRequestError("coalesce_ms", f"is {value}; it must lie between 0 and {MAX_COALESCE_MS}")
    return value


def _utf8(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(field, "is not valid Unicode text: it has a lone surrogate") from None
    return text
