"""VllmEngine's sampling parameters as ours. Pure; knows no model.

Zeroes of fields that cannot be absent mean their defaults, as everywhere in that protocol.
"""

from dataclasses import replace

from kvrelay.errors import InvalidRequestError, UnsupportedError
from kvrelay.response_format import ResponseFormat
from kvrelay.sampling_params import MAX_LOGPROBS, SamplingParams
from kvrelay.vllm_engine.messages import Message

FIELD = "sampling_params"
_SEED_MODULUS = 2**64
"""Seeds are signed there."""


def sampling_from_vllm(message: Message) -> SamplingParams:
    """Checked parameters; `max_tokens` and `seed` are None where they are absent.

    Raises:
        InvalidRequestError: one is out of range; the field begins with `sampling_params.`.
        UnsupportedError: something is asked for that is not offered.
    """
    _refuse_what_is_not_offered(message)
    sampling = SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty or 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=_logit_bias(message),
        seed=message.seed % _SEED_MODULUS if message.HasField("seed") else None,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        ignore_eos=message.ignore_eos,
        logprobs=_logprobs(message),
        n=message.n or 1,
        response_format=_response_format(message),
    )
    try:
        sampling.validate()
    except InvalidRequestError as failure:
        raise InvalidRequestError(f"{FIELD}.{failure.field}", failure.problem) from None
    return sampling


def with_room(sampling: SamplingParams, room: int) -> SamplingParams:
    """Without a `max_tokens`, this protocol's output may take all the room that the prompt leaves, in tokens."""
    return replace(sampling, max_tokens=room) if sampling.max_tokens is None and room > 0 else sampling


def _refuse_what_is_not_offered(message: Message) -> None:
    if message.HasField("prompt_logprobs"):
        raise UnsupportedError("log probabilities of the prompt are not computed; leave prompt_logprobs out")
    if message.HasField("truncate_prompt_tokens"):
        raise UnsupportedError("prompts are not truncated; shorten it and leave truncate_prompt_tokens out")
    if message.HasField("structural_tag"):
        raise UnsupportedError("structural_tag is not offered; send a json_schema, regex, grammar, choice or json_object")


def _logprobs(message: Message) -> int | None:
    if not message.HasField("logprobs"):
        return None
    if message.logprobs < 0:
        raise InvalidRequestError(f"{FIELD}.logprobs", f"is {message.logprobs}; it must lie between 0 and {MAX_LOGPROBS}")
    return int(message.logprobs)


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


def _logit_bias(message: Message) -> dict[int, float]:
    for token_id in message.logit_bias:
        if token_id < 0:
            raise InvalidRequestError(f"{FIELD}.logit_bias[{token_id}]", "is no token id; these begin with 0")
    return dict(message.logit_bias)
