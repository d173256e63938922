"""Turns a client's message into a validated and tokenized request."""

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from gateway.lifecycle.generation_request import GenerationRequest
from gateway.requests.request_validation import check_prompt_token_ids, fit_to_model, parse_request
from gateway.requests.response_formats import ResponseFormats
from gateway.text.template_source import Message
from gateway.text.texts import Texts, TokenBound
from gateway.workers.served_models import ModelLimits, ServedModels
from gateway.workers.tokenizer_cache import TokenizerCache
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import PreconditionError
from kvrelay.v1 import inference_pb2
from kvrelay.wire.convert import with_model_defaults


class PromptPreparation:
    def __init__(
        self,
        models: ServedModels,
        tokenizers: TokenizerCache,
        texts: Texts,
        formats: ResponseFormats,
        worker_wait_ms: int,
    ) -> None:
        self.models = models
        self.tokenizers = tokenizers
        self.texts = texts
        self.formats = formats
        self._worker_wait_ms = worker_wait_ms

    async def prepare(
        self, message: inference_pb2.GenerateRequest, submit_time: float, deadline: float
    ) -> GenerationRequest:
        """Raises:
        InvalidRequestError: a field is wrong.
        ModelNotFoundError, NoChatTemplateError, PreconditionError, UnavailableError: the model
            cannot do it.
        """
        sampling, chat = parse_request(message)
        limits = await self.select_model(message.model, deadline)
        await self.formats.check(sampling, limits)
        token_ids = await self._prompt_token_ids(message, chat, limits, deadline)
        sampling = with_model_defaults(sampling, message.sampling, limits.model)
        request = make_request(limits, token_ids, sampling, submit_time, deadline, message.tenant)
        keeps_output = message.resumable or bool(message.idempotency_key)
        return replace(request, resumable=message.resumable, keeps_output=keeps_output)

    async def select_model(self, name: str, deadline: float) -> ModelLimits:
        """Waits for workers. Raises as `ServedModels.select`."""
        left_s = deadline - asyncio.get_running_loop().time()
        return await self.models.wait_and_select(name, max(min(self._worker_wait_ms / 1000, left_s), 0.0))

    async def _prompt_token_ids(
        self, message: inference_pb2.GenerateRequest, chat: Sequence[Message], limits: ModelLimits, deadline: float
    ) -> Sequence[int]:
        if message.WhichOneof("prompt") == "token_ids":
            check_prompt_token_ids(message.token_ids.ids, "prompt.token_ids", limits)
            # without a tokenizer, the output has no text
            with contextlib.suppress(PreconditionError):
                await self.tokenizers.get(limits.model.fingerprint)
            return message.token_ids.ids
        tokenizer, bound = await self.tokenizers.get(limits.model.fingerprint), prompt_bound(limits)
        if chat:
            return await self.texts.encode_chat(tokenizer, chat, "prompt.chat.messages", bound, deadline)
        return await self.texts.encode(tokenizer, message.text, bound, deadline)


def make_request(
    limits: ModelLimits,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    submit_time: float,
    deadline: float,
    tenant: str = "",
) -> GenerationRequest:
    """Draws the request's id and seed.

    Raises:
        InvalidRequestError: the request does not fit the model.
    """
    resolved = fit_to_model(sampling, len(token_ids), "prompt", limits)
    if resolved.seed is None:
        resolved = replace(resolved, seed=secrets.randbits(63))
    return GenerationRequest(
        request_id=secrets.token_hex(16),
        model=limits.model.name,
        fingerprint=limits.model.fingerprint,
        prompt_token_ids=tuple(token_ids),
        sampling=resolved,
        tenant=tenant,
        submit_time=submit_time,
        deadline=deadline,
    )


def prompt_bound(limits: ModelLimits, field: str = "prompt") -> TokenBound:
    """Leaves room for one output token."""
    return TokenBound(
        field, limits.max_tokens - 1, f"the longest sequence here has {limits.max_tokens} tokens, with its output"
    )
