"""Fields of requests to OpenAI's API: what is passed on, what is refused by name, and what is said
in another way.
"""

from typing import Any

import pytest

from kvrelay.openai_frontend.request_fields import RefusedFieldError, check_fields

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}


def test_what_smg_passes_on_is_passed_to_it() -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 4,
        "stop": ["a"],
        "seed": -1,
        "min_p": 0.1,
        "stream": True,
    }
    assert check_fields("chat/completions", CHAT | sampling) == CHAT | sampling
    assert check_fields("completions", TEXT | sampling | {"echo": True}) == TEXT | sampling | {"echo": True}


@pytest.mark.parametrize(
    ("endpoint", "field", "value"),
    [
        ("chat/completions", "temprature", 1),
        ("chat/completions", "logit_bias", {"5": 1}),
        ("chat/completions", "best_of", 2),
        ("chat/completions", "guided_regex", "a+"),
        ("chat/completions", "structured_outputs", {"regex": "a+"}),
        ("chat/completions", "prompt_logprobs", 1),
        ("completions", "logprobs", 2),
        ("completions", "logprobs", 0),
        ("completions", "suffix", "end"),
        ("completions", "logit_bias", {"5": 1}),
        ("completions", "best_of", 2),
        ("completions", "messages", []),
        ("responses", "logit_bias", {"5": 1}),
        ("responses", "inputs", "x"),
    ],
)
def test_a_field_without_effect_is_refused_by_name(endpoint: str, field: str, value: Any) -> None:
    with pytest.raises(RefusedFieldError, match=field) as refused:
        check_fields(endpoint, {"model": "m", field: value})
    assert refused.value.name == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("logit_bias", {}), ("logit_bias", None), ("best_of", 1), ("functions", []), ("unheard_of", None)],
)
def test_a_value_that_asks_for_nothing_is_left_out(field: str, value: Any) -> None:
    assert check_fields("chat/completions", CHAT | {field: value}) == CHAT


def test_as_many_answers_as_are_computed_may_be_asked_for_as_best_of() -> None:
    assert check_fields("completions", TEXT | {"n": 2, "best_of": 2}) == TEXT | {"n": 2}


def test_a_top_k_that_keeps_all_is_said_as_smg_has_it() -> None:
    assert check_fields("completions", TEXT | {"top_k": 0})["top_k"] == -1
    assert check_fields("completions", TEXT | {"top_k": 5})["top_k"] == 5


def test_tool_calls_without_arguments_have_an_empty_object() -> None:
    call = {"id": "1", "function": {"name": "now", "arguments": ""}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (passed,) = check_fields("chat/completions", {"messages": [message]})["messages"]
    assert passed["tool_calls"] == [{"id": "1", "function": {"name": "now", "arguments": "{}"}}]
    assert call["function"] == {"name": "now", "arguments": ""}, "the request itself stays as it is"


@pytest.mark.parametrize(
    "messages", ["x", None, [None], [{"tool_calls": 3}], [{"tool_calls": [None, {"function": 1}]}]]
)
def test_messages_of_odd_shapes_are_left_to_smg(messages: Any) -> None:
    body = {"messages": messages}
    assert check_fields("chat/completions", body) == ({} if messages is None else body)


def test_other_endpoints_are_passed_on_as_they_are() -> None:
    assert check_fields("embeddings", {"anything": 1}) == {"anything": 1}
