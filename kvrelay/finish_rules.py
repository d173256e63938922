"""When a sequence ends by its own tokens. Applied once per token by the worker that samples; stop strings are the gateway's."""

from kvrelay.model_spec import ModelSpec
from kvrelay.sampling_params import SamplingParams
from kvrelay.work import FinishReason


def ending_token_ids(sampling: SamplingParams, model: ModelSpec) -> frozenset[int]:
    """Tokens that end a sequence: the stop tokens and, unless ignored, the model's end-of-sequence tokens."""
    eos = () if sampling.ignore_eos else model.eos_token_ids
    return frozenset(eos) | frozenset(sampling.stop_token_ids)


def finish_reason(
    token_id: int, index: int, num_prompt_tokens: int, sampling: SamplingParams, model: ModelSpec
) -> FinishReason | None:
    """Why the sequence ends with this token, or None.

    Args:
        token_id: the token just sampled.
        index: its output index, from 0.
        num_prompt_tokens: length of the client's prompt.
        sampling: with `max_tokens` resolved.
        model: the served model.
    """
    assert sampling.max_tokens is not None, "max_tokens is resolved at the gateway"
    if token_id in sampling.stop_token_ids or (token_id in model.eos_token_ids and not sampling.ignore_eos):
        return FinishReason.STOP
    num_tokens = num_prompt_tokens + index + 1
    if index + 1 >= sampling.max_tokens or num_tokens >= model.max_context_tokens:
        return FinishReason.LENGTH
    return None
