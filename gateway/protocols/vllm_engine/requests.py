"""Turns VllmEngine's Generate into a request."""

import asyncio
from collections.abc import Sequence

from gateway.lifecycle.generation_request import GenerationRequest
from gateway.requests.prompt_preparation import PromptPreparation, make_request, prompt_bound
from gateway.requests.request_validation import check_prompt_token_ids
from gateway.requests.tenants import tenant_of_call
from gateway.workers.served_models import ModelLimits
from kvrelay.errors import InvalidRequestError, UnsupportedError
from kvrelay.vllm_engine.client_ids import check_client_id
from kvrelay.vllm_engine.messages import Message
from kvrelay.vllm_engine.sampling import sampling_from_vllm, with_room
from kvrelay.wire.convert import with_model_defaults

ANY_MODEL = ""
NO_TENANT = ""
"""Requests of this protocol name no model and no tenant."""


async def prepare(message: Message, preparation: PromptPreparation, deadline: float) -> GenerationRequest:
    """`deadline` in monotonic seconds.

    Raises:
        UnsupportedError: the message asks for something that is not offered.
        AccessDeniedError: the caller's credential has no tenant of its own.
        KvrelayError: as `PromptPreparation.prepare`.
    """
    check_client_id(message.request_id)
    if message.HasField("mm_inputs") or message.extra_mm_inputs or message.HasField("media_refs"):
        raise UnsupportedError("images, video and audio are not taken; send text or token ids only")
    tenant = tenant_of_call(NO_TENANT)
    sampling = sampling_from_vllm(message.sampling_params)
    now = asyncio.get_running_loop().time()
    limits = await preparation.select_model(ANY_MODEL, deadline)
    sampling = with_model_defaults(sampling, message.sampling_params, limits.model)
    await preparation.formats.check(sampling, limits)
    token_ids = await _prompt_token_ids(message, preparation, limits, deadline)
    sampling = with_room(sampling, limits.max_tokens - len(token_ids))
    return make_request(limits, token_ids, sampling, now, deadline, tenant)


async def _prompt_token_ids(
    message: Message, preparation: PromptPreparation, limits: ModelLimits, deadline: float
) -> Sequence[int]:
    match message.WhichOneof("input"):
        case "tokenized":
            check_prompt_token_ids(message.tokenized.input_ids, "tokenized.input_ids", limits)
            if message.sampling_params.stop:
                await preparation.tokenizers.get(limits.model.fingerprint)
            return message.tokenized.input_ids  # type: ignore[no-any-return]
        case "text":
            tokenizer = await preparation.tokenizers.get(limits.model.fingerprint)
            return await preparation.texts.encode(tokenizer, message.text, prompt_bound(limits), deadline)
        case _:
            raise InvalidRequestError("input", "is absent; send tokenized or text")
