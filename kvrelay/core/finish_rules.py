"""When a sequence ends by its own tokens. Stop strings are the gateway's."""

from kvrelay.core.job import FinishReason
from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.sampling_params import SamplingParams


def ending_token_ids(sampling: SamplingParams, model: ModelSpec) -> frozenset[int]:
    eos = () if sampling.ignore_eos else model.eos_token_ids
    return frozenset(eos) | frozenset(sampling.stop_token_ids)


def finish_reason(
    token_id: int, index: int, num_prompt_tokens: int, sampling: SamplingParams, model: ModelSpec
) -> FinishReason | None:
    """Returns None when the sequence goes on after this token, whose output index is `index`."""
    assert sampling.max_tokens is not None, "max_tokens is resolved at the gateway"
    if token_id in sampling.stop_token_ids or (token_id in model.eos_token_ids and not sampling.ignore_eos):
        return FinishReason.STOP
    num_tokens = num_prompt_tokens + index + 1
    if index + 1 >= sampling.max_tokens or num_tokens >= model.max_context_tokens:
        return FinishReason.LENGTH
    return None
