"""Checks what a client asks for and turns it into plain values, before anything is spent on it. Knows no worker and no session.

Whatever is wrong names its field by its path in the proto and says what is allowed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gateway.chat_template import Message
from kvrelay.errors import InvalidRequestError, ModelNotFoundError
from kvrelay.model_spec import ModelSpec
from kvrelay.sampling_params import DEFAULT_MAX_TOKENS, MAX_STOP_BYTES, SamplingParams
from kvrelay.v1 import inference_pb2, session_pb2
from kvrelay.wire import sampling_from_pb

MAX_KEY_BYTES = 128


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """A served model, and the longest sequence that its workers can hold."""

    model: ModelSpec
    max_sequence_tokens: int

    @property
    def max_tokens(self) -> int:
        """Longest sequence, prompt and output together."""
        return min(self.model.max_context_tokens, self.max_sequence_tokens)


def select_model(name: str, served: Iterable[ModelLimits]) -> ModelLimits:
    """The model of that name; the only one when the name is empty.

    Raises:
        ModelNotFoundError: it is not served, or the name is empty and several are. Lists those that are.
        InvalidRequestError: the name is empty and several are served.
    """
    by_name = {limits.model.name: limits for limits in served}
    names = ", ".join(sorted(by_name))
    if not by_name:
        raise ModelNotFoundError("no model is served now: start workers, or wait until they are up")
    if not name:
        if len(by_name) > 1:
            raise InvalidRequestError("model", f"is empty, and several models are served: name one of {names}")
        return next(iter(by_name.values()))
    if name not in by_name:
        raise ModelNotFoundError(f"model {name!r} is not served; these are: {names}")
    return by_name[name]


def check_key_length(field: str, value: str) -> None:
    """Raises InvalidRequestError when it is longer than 128 bytes."""
    if len(value.encode()) > MAX_KEY_BYTES:
        raise InvalidRequestError(field, f"has {len(value.encode())} bytes; at most {MAX_KEY_BYTES} are allowed")


def parse_sampling(message: session_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters whose ranges are checked, as far as they do not depend on the model.

    Raises:
        InvalidRequestError: one is out of range; the field begins with `sampling.`.
    """
    for number, stop in enumerate(message.stop):
        _check_stop(f"sampling.stop[{number}]", stop)
    if message.HasField("response_format") and message.response_format.WhichOneof("form") is None:
        raise InvalidRequestError(
            "sampling.response_format", "names no form; send json_schema, regex or grammar, or leave it away"
        )
    sampling = sampling_from_pb(message)
    try:
        sampling.validate()
    except InvalidRequestError as failure:
        raise InvalidRequestError(f"sampling.{failure.field}", failure.problem) from None
    return sampling


def _check_stop(field: str, stop: bytes) -> None:
    if not 1 <= len(stop) <= MAX_STOP_BYTES:
        raise InvalidRequestError(field, f"has {len(stop)} bytes; it must have 1 to {MAX_STOP_BYTES}")
    try:
        stop.decode()
    except UnicodeDecodeError as failure:
        raise InvalidRequestError(field, f"is not UTF-8: {failure.reason} at byte {failure.start}; send it as UTF-8") from None


def parse_messages(messages: Sequence[inference_pb2.ChatMessage], field: str) -> tuple[Message, ...]:
    """Messages for a chat template.

    Raises:
        InvalidRequestError: there is none, or one has no role.
    """
    if not messages:
        raise InvalidRequestError(field, "is empty; send at least one message")
    for number, message in enumerate(messages):
        if not message.role:
            raise InvalidRequestError(f"{field}[{number}].role", "is empty; name who speaks, such as user")
    return tuple({"role": message.role, "content": message.content} for message in messages)


def check_token_ids(token_ids: Sequence[int], field: str, model: ModelSpec) -> None:
    """Raises InvalidRequestError for the first id that is not in the model's vocabulary."""
    for number, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            problem = f"is {token_id}; the model's vocabulary has ids from 0 to {model.vocab_size - 1}"
            raise InvalidRequestError(f"{field}[{number}]", problem)


def fit_to_model(sampling: SamplingParams, num_prompt_tokens: int, prompt_field: str, limits: ModelLimits) -> SamplingParams:
    """Checks a request against its model and resolves `max_tokens`.

    Args:
        sampling: checked by `parse_sampling`.
        num_prompt_tokens: length of the prompt.
        prompt_field: the field to name when the prompt is too long or empty.
        limits: the model.

    Raises:
        InvalidRequestError: prompt or max_tokens are over the limit, or a token id is not in the vocabulary.
    """
    room = limits.max_tokens - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequestError(prompt_field, "is empty; a prompt needs at least one token")
    if room < 1:
        problem = f"has {num_prompt_tokens} tokens; the longest sequence here has {limits.max_tokens}, with its output"
        raise InvalidRequestError(prompt_field, problem)
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
        raise InvalidRequestError("sampling.min_tokens", f"is {sampling.min_tokens}; it must lie between 0 and {max_tokens}")
    return max_tokens
