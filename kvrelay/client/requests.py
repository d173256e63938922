"""Builds the messages that the client sends, from what a program passes. Shared by the async and the sync client.

What cannot be put into a message at all is refused here with the same error that the server would give; all other checks are the
server's.
"""

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvrelay import wire
from kvrelay.client.results import ChatMessage
from kvrelay.config import MAX_COALESCE_MS
from kvrelay.errors import InvalidRequestError
from kvrelay.sampling_params import SamplingParams
from kvrelay.v1 import inference_pb2, session_pb2

Message = ChatMessage | Mapping[str, str]
"""A chat message, also as {"role": ..., "content": ...}."""


def generate_request(
    prompt: str | None,
    messages: Iterable[Message] | None,
    token_ids: Sequence[int] | None,
    *,
    model: str,
    tenant: str,
    resumable: bool,
    idempotency_key: str | None,
    coalesce_ms: int | None,
    sampling: Mapping[str, Any],
) -> inference_pb2.GenerateRequest:
    """A request for one completion.

    Raises:
        InvalidRequestError: not exactly one kind of prompt, or a value that the protocol cannot carry.
        TypeError: no such sampling parameter.
    """
    if sum(kind is not None for kind in (prompt, messages, token_ids)) != 1:
        raise InvalidRequestError("prompt", "must be given as exactly one of: prompt, messages, token_ids")
    if idempotency_key is None and resumable:
        # So that a stream that broke before its request's id arrived can be asked for again without a second request.
        idempotency_key = uuid.uuid4().hex
    request = inference_pb2.GenerateRequest(
        model=model,
        tenant=tenant,
        resumable=resumable,
        idempotency_key=idempotency_key or "",
        coalesce_ms=_coalesce_ms(coalesce_ms),
        sampling=sampling_message(sampling),
    )
    if prompt is not None:
        request.text = _utf8("prompt", prompt)
    elif messages is not None:
        request.chat.messages.extend(chat_messages(messages))
        request.chat.SetInParent()  # an empty chat is still a chat, and the server says what is wrong with it
    else:
        request.token_ids.ids.extend(_token_ids(token_ids or ()))
        request.token_ids.SetInParent()
    return request


def generate_again(request: inference_pb2.GenerateRequest, seed: int) -> inference_pb2.GenerateRequest:
    """The same request once more, with the seed that it was given by the gateway, if it had none itself.

    It is another body then, for which its idempotency key does not stand; it gets one of its own, always the same.
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
    sampling: Mapping[str, Any],
    timeout_ms: int,
    coalesce_ms: int | None,
) -> inference_pb2.ConverseRequest:
    """One turn; a plain text is the user's. Without sampling parameters those of the turn before hold.

    Raises:
        InvalidRequestError, TypeError: as `generate_request`.
    """
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
    """Asks for a request's output again."""
    return inference_pb2.ResumeRequest(request_id=request_id, from_index=from_index, coalesce_ms=_coalesce_ms(coalesce_ms))


def tokenize_request(text: str | None, messages: Iterable[Message] | None, model: str) -> inference_pb2.TokenizeRequest:
    """Exactly one of text and messages.

    Raises:
        InvalidRequestError: none or both.
    """
    if (text is None) == (messages is None):
        raise InvalidRequestError("text", "must be given as exactly one of: text, messages")
    if text is not None:
        return inference_pb2.TokenizeRequest(model=model, text=_utf8("text", text))
    chat = inference_pb2.ChatMessages(messages=chat_messages(messages or ()))
    return inference_pb2.TokenizeRequest(model=model, chat=chat)


def detokenize_request(token_ids: Iterable[int], model: str, keep_special_tokens: bool) -> inference_pb2.DetokenizeRequest:
    """Raises InvalidRequestError for ids that cannot be."""
    return inference_pb2.DetokenizeRequest(model=model, token_ids=_token_ids(token_ids), keep_special_tokens=keep_special_tokens)


def chat_messages(messages: Iterable[Message]) -> list[inference_pb2.ChatMessage]:
    """Messages as the protocol has them.

    Raises:
        InvalidRequestError: one has no role or no content, or its text is not valid.
    """
    return [_chat_message(number, message) for number, message in enumerate(messages)]


def sampling_message(sampling: Mapping[str, Any]) -> session_pb2.SamplingParams:
    """Sampling parameters by name, as `kvrelay.sampling_params.SamplingParams` has them; `stop` may be one string.

    Raises:
        InvalidRequestError: a value is out of its range.
        TypeError: no such parameter.
    """
    values = dict(sampling)
    for name in ("stop", "stop_token_ids"):
        if name in values:
            values[name] = (values[name],) if isinstance(values[name], str | int) else tuple(values[name])
    for number, stop in enumerate(values.get("stop", ())):
        _utf8(f"stop[{number}]", stop)
    params = SamplingParams(**values)
    params.validate()
    try:
        return wire.sampling_to_pb(params)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError("sampling", f"has a value that cannot be sent: {error}") from None


def _chat_message(number: int, message: Message) -> inference_pb2.ChatMessage:
    if isinstance(message, ChatMessage):
        message = {"role": message.role, "content": message.content}
    missing = {"role", "content"} - message.keys()
    if missing:
        raise InvalidRequestError(f"messages[{number}]", f"has no {min(missing)}")
    return inference_pb2.ChatMessage(
        role=_utf8(f"messages[{number}].role", message["role"]), content=_utf8(f"messages[{number}].content", message["content"])
    )


def _token_ids(token_ids: Iterable[int]) -> list[int]:
    ids = list(token_ids)
    for number, token_id in enumerate(ids):
        if not 0 <= token_id < 2**32:
            raise InvalidRequestError(f"token_ids[{number}]", f"is {token_id}; it must be an id of the model's vocabulary")
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
