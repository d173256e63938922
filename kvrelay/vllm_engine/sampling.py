"""Converts VllmEngine's sampling parameters to ours. Pure.

In that protocol, 0 in a field without presence means its default.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvrelay.core.model_spec import ModelSpec
from kvrelay.core.response_format import ResponseFormat
from kvrelay.core.sampling_params import PARAMETERS, SamplingParams
from kvrelay.errors import InvalidRequestError, UnsupportedError
from kvrelay.vllm_engine.messages import Message

FIELD = "sampling_params"
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "logit_bias": dict,
    "stop": tuple,
    "stop_token_ids": tuple,
    "seed": lambda seed: seed % 2**64,  # it is signed there
}


def sampling_from_vllm(message: Message) -> SamplingParams:
    """Validates. `max_tokens` and `seed` are None if absent.

    Raises InvalidRequestError, whose field begins with `sampling_params.`, or UnsupportedError.
    """
    _refuse_what_is_not_offered(message)
    values = {field.name: value for field, value in message.ListFields() if field.name in PARAMETERS}
    try:
        for name in _CONVERSIONS.keys() & values.keys():
            PARAMETERS[name].check_count(values[name])
            values[name] = _CONVERSIONS[name](values[name])
        sampling = SamplingParams(**values, response_format=_response_format(message))
        sampling.validate()
    except InvalidRequestError as failure:
        raise InvalidRequestError(f"{FIELD}.{failure.field}", failure.problem) from None
    return sampling


def defaults_json(model: ModelSpec) -> str:
    """The model's defaults for GetModelInfo; empty when it has none. smg adds them to requests."""
    stated = model.sampling_defaults.stated()
    return json.dumps(stated) if stated else ""


def with_room(sampling: SamplingParams, room: int) -> SamplingParams:
    """Sets an absent `max_tokens` to `room`, the tokens that the prompt leaves."""
    return replace(sampling, max_tokens=room) if sampling.max_tokens is None and room > 0 else sampling


def _refuse_what_is_not_offered(message: Message) -> None:
    if message.HasField("prompt_logprobs"):
        raise UnsupportedError("log probabilities of the prompt are not computed; leave prompt_logprobs out")
    if message.HasField("truncate_prompt_tokens"):
        raise UnsupportedError("prompts are not truncated; shorten it and leave truncate_prompt_tokens out")
    if message.HasField("structural_tag"):
        raise UnsupportedError(
            "structural_tag is not offered; send a json_schema, regex, grammar, choice or json_object"
        )


def _response_format(message: Message) -> ResponseFormat | None:
    match message.WhichOneof("constraint"):
        case "json_schema":
            return ResponseFormat.json_schema(message.json_schema)
        case "json_object":
            return ResponseFormat.json_object() if message.json_object else None
        case "regex":
            return ResponseFormat.regex(message.regex)
        case "grammar":
            return ResponseFormat.grammar(message.grammar)
        case "choice":
            return ResponseFormat.choice(message.choice.choices)
        case _:
            return None
