"""From a client's message to a validated and tokenized request. Spends time on nothing but the tokenizer; allocates nothing."""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from gateway.chat_template import Message
from gateway.generation_request import GenerationRequest
from gateway.relay import Relay, new_request_id
from gateway.request_validation import (
    ModelLimits,
    check_key_length,
    check_token_ids,
    fit_to_model,
    parse_messages,
    parse_sampling,
)
from gateway.tokenizer import ModelTokenizer
from kvrelay.errors import InvalidRequestError, PreconditionError
from kvrelay.sampling_params import SamplingParams
from kvrelay.v1 import inference_pb2

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

INLINE_CHARACTERS = 4000
"""Texts up to this length are tokenized on the event loop: a thread would cost more."""
CHARACTERS_PER_MESSAGE = 40
"""What a message without content counts in a chat: the template renders it too."""


async def prepare(request: inference_pb2.GenerateRequest, relay: Relay, submit_time: float, deadline: float) -> GenerationRequest:
    """Validates and tokenizes a Generate request.

    Raises:
        InvalidRequestError: a field is wrong.
        ModelNotFoundError, NoChatTemplateError, PreconditionError, UnavailableError: the model cannot do it.
    """
    check_key_length("tenant", request.tenant)
    check_key_length("idempotency_key", request.idempotency_key)
    sampling = parse_sampling(request.sampling)
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt", "is absent; send text, chat or token_ids")
    limits = await relay.models.wait_and_select(request.model, _wait_s(relay, deadline))
    await check_response_format(sampling, relay, limits)
    token_ids = await _prompt_token_ids(request, kind, relay, limits)
    return make_request(
        limits,
        token_ids,
        sampling,
        tenant=request.tenant,
        submit_time=submit_time,
        deadline=deadline,
        resumable=request.resumable,
    )


async def check_response_format(sampling: SamplingParams, relay: Relay, limits: ModelLimits) -> None:
    """Before anything is spent on the request. To be awaited by whatever makes requests.

    Raises:
        InvalidRequestError: the form is wrong, too complex or not supported.
        OverloadedError: too many forms are checked now.
        PreconditionError: the model cannot end an output where its form does.
    """
    form = sampling.response_format
    if form is None:
        return
    if not limits.model.eos_token_ids:
        raise PreconditionError("the model has no end-of-sequence token, with which structured output ends; use another model")
    try:
        with relay.metrics.noting_refusals():
            await relay.forms.get(form)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"sampling.{error.field}", error.problem) from None


def make_request(
    limits: ModelLimits,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    tenant: str,
    submit_time: float,
    deadline: float,
    resumable: bool = False,
    preferred_decode_worker_id: str | None = None,
) -> GenerationRequest:
    """A request whose prompt is tokenized.

    Raises:
        InvalidRequestError: prompt, max_tokens or a token id do not fit the model.
    """
    resolved = fit_to_model(sampling, len(token_ids), "prompt", limits)
    if resolved.seed is None:
        resolved = replace(resolved, seed=secrets.randbits(63))
    return GenerationRequest(
        request_id=new_request_id(),
        model=limits.model.name,
        fingerprint=limits.model.fingerprint,
        prompt_token_ids=tuple(token_ids),
        sampling=resolved,
        tenant=tenant,
        submit_time=submit_time,
        deadline=deadline,
        resumable=resumable,
        preferred_decode_worker_id=preferred_decode_worker_id,
    )


async def _prompt_token_ids(
    request: inference_pb2.GenerateRequest, kind: str, relay: Relay, limits: ModelLimits
) -> Sequence[int]:
    if kind == "token_ids":
        if not request.token_ids.ids:
            raise InvalidRequestError("prompt.token_ids", "is empty; a prompt needs at least one token")
        check_token_ids(request.token_ids.ids, "prompt.token_ids", limits.model)
        await _try_to_have_tokenizer(relay, limits)
        return request.token_ids.ids
    if kind == "text":
        if not request.text:
            raise InvalidRequestError("prompt.text", "is empty; a prompt needs at least one token")
        tokenizer = await relay.tokenizers.get(limits.model.fingerprint)
        return await encode_text(tokenizer, request.text)
    messages = parse_messages(request.chat.messages, "prompt.chat.messages")
    tokenizer = await relay.tokenizers.get(limits.model.fingerprint)
    return await encode_rendered(tokenizer, await render_chat(tokenizer, messages, "prompt.chat.messages"))


async def _try_to_have_tokenizer(relay: Relay, limits: ModelLimits) -> None:
    """Token ids can be continued without a tokenizer; then the output has no text."""
    try:
        await relay.tokenizers.get(limits.model.fingerprint)
    except PreconditionError:
        return


async def render_chat(tokenizer: ModelTokenizer, messages: Sequence[Message], field: str) -> str:
    """The prompt's text for a chat; see `ModelTokenizer.render_chat`."""
    size = sum(len(message["content"]) + CHARACTERS_PER_MESSAGE for message in messages)
    return await _run(size, partial(tokenizer.render_chat, field=field), messages)


async def encode_text(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """Tokens of a text."""
    return await _run(len(text), tokenizer.encode_text, text)


async def encode_rendered(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """Tokens of a rendered chat."""
    return await _run(len(text), tokenizer.encode_rendered, text)


async def _run(size: int, function: Callable[[_Argument], _Result], argument: _Argument) -> _Result:
    if size <= INLINE_CHARACTERS:
        return function(argument)
    return await asyncio.to_thread(function, argument)


def _wait_s(relay: Relay, deadline: float) -> float:
    left_s = deadline - asyncio.get_running_loop().time()
    return max(min(relay.settings.worker_wait_ms / 1000, left_s), 0.0)
