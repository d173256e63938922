"""Checks what a client asks for and turns it into plain values.

Checks raise InvalidRequestError, which names a field by its path in the proto.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from gateway.text.template_source import Message
from gateway.workers.served_models import ModelLimits
from kvrelay.config.settings import RequestSettings
from kvrelay.core.bounds import check_length
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.wire.convert import sampling_from_pb

MAX_MESSAGES = 4096


def deadline_of(settings: RequestSettings, *allowed_s: float | None) -> float:
    """Returns monotonic seconds. `allowed_s` has None where the client sets nothing."""
    given_s = [seconds for seconds in allowed_s if seconds is not None]
    wanted_s = min(given_s) if given_s else settings.default_timeout_ms / 1000
    return asyncio.get_running_loop().time() + max(min(wanted_s, settings.max_timeout_ms / 1000), 0.0)


def parse_request(message: inference_pb2.GenerateRequest) -> tuple[SamplingParams, tuple[Message, ...]]:
    """Checks all that needs no model."""
    check_length("tenant", message.tenant)
    check_length("idempotency_key", message.idempotency_key)
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt", "is absent; send text, chat or token_ids")
    if kind != "chat" and not (message.text or message.token_ids.ids):
        raise InvalidRequestError(f"prompt.{kind}", "is empty; a prompt needs at least one token")
    chat = parse_messages(message.chat.messages, "prompt.chat.messages") if kind == "chat" else ()
    return parse_sampling(message.sampling), chat


def parse_sampling(message: session_pb2.SamplingParams) -> SamplingParams:
    """Checks ranges that need no model."""
    if message.HasField("response_format") and message.response_format.WhichOneof("format") is None:
        raise InvalidRequestError(
            "sampling.response_format", "names no response format; send json_schema, regex or grammar, or leave it away"
        )
    try:
        sampling = sampling_from_pb(message)
        sampling.validate()
    except InvalidRequestError as failure:
        raise InvalidRequestError(f"sampling.{failure.field}", failure.problem) from None
    return sampling


def parse_messages(messages: Sequence[inference_pb2.ChatMessage], field: str) -> tuple[Message, ...]:
    if not messages:
        raise InvalidRequestError(field, "is empty; send at least one message")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            field, f"has {len(messages)} messages; at most {MAX_MESSAGES} are taken, so leave old ones away"
        )
    for number, message in enumerate(messages):
        if not message.role:
            raise InvalidRequestError(f"{field}[{number}].role", "is empty; name who speaks, such as user")
        check_length(f"{field}[{number}].role", message.role)
    return tuple({"role": message.role, "content": message.content} for message in messages)


def check_token_ids(token_ids: Sequence[int], field: str, model: ModelSpec) -> None:
    """Callers bound their count."""
    if max(token_ids, default=0) < model.vocab_size:
        return
    for number, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            problem = f"is {token_id}; the model's vocabulary has ids from 0 to {model.vocab_size - 1}"
            raise InvalidRequestError(f"{field}[{number}]", problem)


def check_prompt_token_ids(token_ids: Sequence[int], field: str, limits: ModelLimits) -> None:
    check_prompt_length(len(token_ids), "prompt", limits)
    check_token_ids(token_ids, field, limits.model)


def check_prompt_length(num_tokens: int, field: str, limits: ModelLimits) -> None:
    if num_tokens == 0:
        raise InvalidRequestError(field, "is empty; a prompt needs at least one token")
    if num_tokens >= limits.max_tokens:
        problem = f"has {num_tokens} tokens; the longest sequence here has {limits.max_tokens} tokens, with its output"
        raise InvalidRequestError(field, problem)


def fit_to_model(
    sampling: SamplingParams, num_prompt_tokens: int, prompt_field: str, limits: ModelLimits
) -> SamplingParams:
    """Also resolves `max_tokens`."""
    check_prompt_length(num_prompt_tokens, prompt_field, limits)
    room = limits.max_tokens - num_prompt_tokens
    check_token_ids(sampling.stop_token_ids, "sampling.stop_token_ids", limits.model)
    for token_id in sampling.logit_bias:
        if token_id >= limits.model.vocab_size:
            problem = f"is no id of the model's vocabulary, which ends with {limits.model.vocab_size - 1}"
            raise InvalidRequestError(f"sampling.logit_bias[{token_id}]", problem)
    return replace(sampling, max_tokens=_resolve_max_tokens(sampling, room, limits))


def _resolve_max_tokens(sampling: SamplingParams, room: int, limits: ModelLimits) -> int:
    if sampling.max_tokens is None:
        max_tokens = min(DEFAULT_MAX_TOKENS, room)
    elif sampling.max_tokens > room:
        problem = f"is {sampling.max_tokens}; after this prompt there is room for {room} of {limits.max_tokens} tokens"
        raise InvalidRequestError("sampling.max_tokens", problem)
    else:
        max_tokens = sampling.max_tokens
    if sampling.min_tokens > max_tokens:
        raise InvalidRequestError(
            "sampling.min_tokens", f"is {sampling.min_tokens}; it must lie between 0 and {max_tokens}"
        )
    return max_tokens
