"""Ranges of sampling parameters: what is refused names its field."""

import math
from typing import Any

import pytest

from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": math.inf}),
        ("top_k", {"top_k": -1}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.01}),
        ("min_p", {"min_p": -0.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("presence_penalty", {"presence_penalty": 2.5}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("logit_bias[7]", {"logit_bias": {7: 101.0}}),
        ("logit_bias", {"logit_bias": dict.fromkeys(range(1025), 0.0)}),
        ("seed", {"seed": 2**64}),
        ("stop", {"stop": ("x",) * 17}),
        ("stop[1]", {"stop": ("x", "")}),
        ("stop[0]", {"stop": ("ä" * 129,)}),
        ("stop_token_ids", {"stop_token_ids": tuple(range(65))}),
        ("max_tokens", {"max_tokens": 0}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("logprobs", {"logprobs": 21}),
        ("n", {"n": 9}),
        ("n", {"n": 0}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_fields_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        SamplingParams(**values).validate()
    assert refusal.value.field == field


def test_defaults_and_the_ends_of_ranges_are_accepted() -> None:
    SamplingParams().validate()
    SamplingParams(
        temperature=0.0, top_p=1.0, min_p=1.0, n=8, logprobs=20, max_tokens=1, min_tokens=1, seed=2**64 - 1
    ).validate()


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-6).greedy
