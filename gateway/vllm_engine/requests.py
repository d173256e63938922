"""From VllmEngine's Generate to a validated and tokenized request of ours. Spends nothing but the tokenizer's time."""

import asyncio

from gateway.generation_request import GenerationRequest
from gateway.prompt_preparation import check_response_format, encode_text, make_request
from gateway.relay import Relay
from gateway.request_validation import ModelLimits, check_token_ids
from kvrelay.errors import InvalidRequestError, UnsupportedError
from kvrelay.vllm_engine.messages import Message
from kvrelay.vllm_engine.sampling import sampling_from_vllm, with_room

ANY_MODEL = ""
"""Requests of this protocol name no model: the only one is meant."""


async def prepare(message: Message, relay: Relay, deadline: float) -> GenerationRequest:
    """A request that can be started.

    Args:
        message: a GenerateRequest of VllmEngine.
        relay: this gateway.
        deadline: monotonic seconds.

    Raises:
        InvalidRequestError: a field is wrong, or several models are served.
        UnsupportedError: something is asked for that is not offered.
        ModelNotFoundError, PreconditionError, UnavailableError: the model cannot do it.
    """
    if not message.request_id:
        raise InvalidRequestError("request_id", "is empty; Abort needs it")
    if message.HasField("mm_inputs") or message.extra_mm_inputs or message.HasField("media_refs"):
        raise UnsupportedError("images, video and audio are not taken; send text or token ids only")
    sampling = sampling_from_vllm(message.sampling_params)
    now = asyncio.get_running_loop().time()
    wait_s = max(min(relay.settings.worker_wait_ms / 1000, deadline - now), 0.0)
    limits = await relay.models.wait_and_select(ANY_MODEL, wait_s)
    await check_response_format(sampling, relay, limits)
    token_ids = await _prompt_token_ids(message, relay, limits)
    sampling = with_room(sampling, limits.max_tokens - len(token_ids))
    return make_request(limits, token_ids, sampling, tenant="", submit_time=now, deadline=deadline)


async def _prompt_token_ids(message: Message, relay: Relay, limits: ModelLimits) -> list[int]:
    match message.WhichOneof("input"):
        case "tokenized":
            token_ids = list(message.tokenized.input_ids)
            check_token_ids(token_ids, "tokenized.input_ids", limits.model)
            if message.sampling_params.stop:
                await relay.tokenizers.get(limits.model.fingerprint)
            return token_ids
        case "text":
            return await encode_text(await relay.tokenizers.get(limits.model.fingerprint), message.text)
        case _:
            raise InvalidRequestError("input", "is absent; send tokenized or text")
