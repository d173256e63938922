"""Refuses by name each field of an OpenAI request that would have no effect. Pure.

smg silently drops fields that it does not know, such as a misspelt one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


class RefusedFieldError(Exception):
    """`name` is `param` in OpenAI's errors."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name


_SAMPLING = (
    *(
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "min_tokens",
    ),
    *("max_tokens", "n", "seed", "stop", "stop_token_ids", "ignore_eos", "regex", "ebnf"),
    *("skip_special_tokens", "no_stop_trim"),
)
_ANNOTATIONS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""They do not change the answer."""
_HINTS = ("prediction", "verbosity", "reasoning_effort")
"""A model or an engine may ignore them."""

_NOT_PASSED_ON = "is not supported on the OpenAI port; leave it out, or use kvrelay's own API (docs/guides/clients.md)"
_USE_RESPONSE_FORMAT = "is not supported; use response_format with a JSON schema, or regex or ebnf"


@dataclass(frozen=True, slots=True)
class _Endpoint:
    allowed: frozenset[str]
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """By name: the neutral value, which is dropped, and the problem of any other."""


_REFUSED: dict[str, tuple[Any, str]] = {
    "logit_bias": ({}, _NOT_PASSED_ON),
    "prompt_logprobs": (0, "is not supported; log probabilities are those of the output"),
    "return_hidden_states": (False, _NOT_PASSED_ON),
    "lora_path": ("", "is not supported; the cluster serves one model"),
    **dict.fromkeys(("guided_regex", "guided_json", "guided_choice", "guided_grammar"), (None, _USE_RESPONSE_FORMAT)),
    "structured_outputs": ({}, _USE_RESPONSE_FORMAT),
}

_ENDPOINTS = {
    "chat/completions": _Endpoint(
        allowed=frozenset(
            (
                *("messages", "model", "stream", "stream_options", "response_format", "tools", "tool_choice"),
                *("logprobs", "top_logprobs", "max_completion_tokens", "modalities", "parallel_tool_calls"),
                *("chat_template_kwargs", "continue_final_message", "separate_reasoning", "stream_reasoning"),
                *(*_SAMPLING, *_ANNOTATIONS, *_HINTS),
            )
        ),
        refused={
            **_REFUSED,
            "best_of": (1, "is not supported; ask for n answers and choose"),
            "audio": (None, "is not supported; the output is text"),
            "web_search_options": (None, "is not supported; nothing is looked up"),
            "functions": ([], "is not supported; use tools"),
            "function_call": ("none", "is not supported; use tool_choice"),
        },
    ),
    "completions": _Endpoint(
        allowed=frozenset(("prompt", "model", "stream", "stream_options", "echo", *_SAMPLING, *_ANNOTATIONS)),
        refused={
            **_REFUSED,
            "logprobs": (None, "is not supported here; chat completions have logprobs, and so has kvrelay's own API"),
            "suffix": ("", "is not supported; the model continues the prompt only"),
        },
    ),
    "responses": _Endpoint(
        allowed=frozenset(
            (
                *(
                    "input",
                    "instructions",
                    "model",
                    "stream",
                    "stream_options",
                    "text",
                    "tools",
                    "tool_choice",
                    "reasoning",
                ),
                *("max_output_tokens", "max_tool_calls", "parallel_tool_calls", "previous_response_id", "conversation"),
                *("include", "prompt", "top_logprobs", "truncation", "request_id"),
                *("temperature", "top_p", "top_k", "min_p", "stop"),
                *("frequency_penalty", "presence_penalty", "repetition_penalty", *_ANNOTATIONS),
            )
        ),
        refused={**_REFUSED, "background": (False, "is not supported: answers are not kept; stream them")},
    ),
}


def check_fields(endpoint: str, body: Body) -> Body:
    """Returns the body to forward. `endpoint` is the path below /v1/; only `_ENDPOINTS` are
    checked. Raises RefusedFieldError.
    """
    known = _ENDPOINTS.get(endpoint)
    if known is None:
        return body
    passed = {}
    for name, value in body.items():
        if value is None:
            continue  # some clients send null for every field that was not given
        if name in known.refused:
            neutral, problem = known.refused[name]
            if value != neutral:
                raise RefusedFieldError(name, problem)
        elif name in known.allowed:
            passed[name] = value
        elif name == "best_of":
            _check_best_of(value, body)
        else:
            raise RefusedFieldError(name[:100], "is no field of this request; check its spelling, or leave it out")
    for name, change in _CHANGES.items():
        if name in passed:
            passed[name] = change(passed[name])
    return passed


def _check_best_of(value: Any, body: Body) -> None:
    if value != (body.get("n") or 1):
        raise RefusedFieldError("best_of", "must equal n: of several answers all are returned, none is chosen")


def _top_k(value: Any) -> Any:
    """0 keeps all tokens here and in transformers; smg uses -1 for that."""
    return -1 if value == 0 and not isinstance(value, bool) else value


def _messages(value: Any) -> Any:
    """Some clients send back tool calls whose arguments are "": no arguments."""
    return [_message(entry) for entry in value] if isinstance(value, list) else value


def _message(message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return {**message, "tool_calls": [_tool_call(call) for call in calls]} if isinstance(calls, list) else message


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str) and not function["arguments"].strip():
        return {**call, "function": {**function, "arguments": "{}"}}
    return call


_CHANGES: dict[str, Callable[[Any], Any]] = {"top_k": _top_k, "messages": _messages}
"""Rewrites values into those that smg accepts."""
