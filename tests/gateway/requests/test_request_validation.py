"""Bad requests: each names its field and what is allowed."""

import asyncio

import pytest

from gateway.requests.request_validation import (
    check_token_ids,
    deadline_of,
    fit_to_model,
    parse_messages,
    parse_sampling,
)
from gateway.workers.served_models import ModelLimits, select_model
from kvrelay.config.settings import RequestSettings
from kvrelay.core.bounds import check_length
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.errors import InvalidRequestError, ModelNotFoundError
from kvrelay.v1 import inference_pb2
from kvrelay.v1.session_pb2 import SamplingParams as SamplingMessage

MODEL = ModelSpec("tiny", "llama", KVLayout(2, 2, 16, "float32"), 320, 512, (0,), "f1")
LIMITS = ModelLimits(MODEL, max_sequence_tokens=400)


@pytest.mark.parametrize(
    ("message", "field", "hint"),
    [
        (SamplingMessage(temperature=float("nan")), "sampling.temperature", "100"),
        (SamplingMessage(temperature=-1), "sampling.temperature", "[0.0, 100.0]"),
        (SamplingMessage(temperature=float("inf")), "sampling.temperature", "100"),
        (SamplingMessage(top_p=0), "sampling.top_p", "(0.0, 1.0]"),
        (SamplingMessage(min_p=1.5), "sampling.min_p", "1.0"),
        (SamplingMessage(n=9), "sampling.n", "[1, 8]"),
        (SamplingMessage(n=0), "sampling.n", "[1, 8]"),
        (SamplingMessage(max_tokens=0), "sampling.max_tokens", "[1,"),
        (SamplingMessage(logprobs=21), "sampling.logprobs", "20"),
        (SamplingMessage(stop=[b"ok", b"\xff\xfe"]), "sampling.stop[1]", "UTF-8"),
        (SamplingMessage(stop=[b""]), "sampling.stop[0]", "1 to 256"),
        (SamplingMessage(stop=[b"x" * 257]), "sampling.stop[0]", "1 to 256"),
        (SamplingMessage(stop=[b"x"] * 17), "sampling.stop", "16"),
        (SamplingMessage(logit_bias={3: float("nan")}), "sampling.logit_bias[3]", "100"),
        (SamplingMessage(min_tokens=5, max_tokens=4), "sampling.min_tokens", "max_tokens"),
        (SamplingMessage(repetition_penalty=0), "sampling.repetition_penalty", "(0.0"),
    ],
)
def test_bad_sampling_parameters_are_named(message: SamplingMessage, field: str, hint: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_sampling(message)
    assert refused.value.field == field
    assert hint in refused.value.problem


def test_absent_sampling_takes_the_defaults() -> None:
    assert parse_sampling(SamplingMessage()) == SamplingParams()


@pytest.mark.parametrize(
    ("sampling", "num_prompt_tokens", "field", "hint"),
    [
        (SamplingParams(), 0, "text", "at least one token"),
        (SamplingParams(), 400, "text", "400"),
        (SamplingParams(max_tokens=301), 100, "sampling.max_tokens", "room for 300"),
        (SamplingParams(min_tokens=300), 200, "sampling.min_tokens", "200"),
        (SamplingParams(stop_token_ids=(1, 320)), 10, "sampling.stop_token_ids[1]", "319"),
        (SamplingParams(logit_bias={320: 1.0}), 10, "sampling.logit_bias[320]", "319"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    sampling: SamplingParams, num_prompt_tokens: int, field: str, hint: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        fit_to_model(sampling, num_prompt_tokens, "text", LIMITS)
    assert refused.value.field == field
    assert hint in refused.value.problem


@pytest.mark.parametrize(("num_prompt_tokens", "expected"), [(10, 256), (390, 10)])
def test_max_tokens_defaults_to_what_there_is_room_for(num_prompt_tokens: int, expected: int) -> None:
    assert fit_to_model(SamplingParams(), num_prompt_tokens, "text", LIMITS).max_tokens == expected


def test_ids_out_of_the_vocabulary_are_named() -> None:
    check_token_ids([0, 319], "token_ids.ids", MODEL)
    with pytest.raises(InvalidRequestError) as refused:
        check_token_ids([0, 1, 2, 320], "token_ids.ids", MODEL)
    assert refused.value.field == "token_ids.ids[3]"


def test_an_unknown_model_is_answered_with_those_that_are_served() -> None:
    with pytest.raises(ModelNotFoundError, match="tiny"):
        select_model("huge", [LIMITS])
    with pytest.raises(ModelNotFoundError, match="no model"):
        select_model("", [])


def test_the_only_model_needs_no_name() -> None:
    other = ModelLimits(ModelSpec("other", "llama", MODEL.kv_layout, 320, 512, (0,), "f2"), 400)
    assert select_model("", [LIMITS]) is LIMITS
    with pytest.raises(InvalidRequestError, match="other, tiny"):
        select_model("", [LIMITS, other])


def test_messages_need_a_role() -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        parse_messages([], "chat.messages")
    with pytest.raises(InvalidRequestError) as refused:
        parse_messages(
            [inference_pb2.ChatMessage(role="user"), inference_pb2.ChatMessage(content="x")], "chat.messages"
        )
    assert refused.value.field == "chat.messages[1].role"


@pytest.mark.parametrize(
    ("allowed_s", "given_s"), [((None,), 2.0), ((3.0, None), 3.0), ((10.0**9,), 5.0), ((-1.0, 3.0), 0.0)], ids=str
)
async def test_a_deadline_lies_within_the_longest(allowed_s: tuple[float | None, ...], given_s: float) -> None:
    settings = RequestSettings(default_timeout_ms=2000, max_timeout_ms=5000)
    clock = asyncio.get_running_loop().time
    before, deadline, after = clock(), deadline_of(settings, *allowed_s), clock()
    assert before + given_s <= deadline <= after + given_s


def test_a_role_is_short() -> None:
    with pytest.raises(InvalidRequestError, match=r"chat\.messages\[1\]\.role has 129 bytes"):
        parse_messages([inference_pb2.ChatMessage(role=role) for role in ("user", "r" * 129)], "chat.messages")


def test_a_long_tenant_is_refused_by_its_bytes() -> None:
    check_length("tenant", "x" * 128)
    with pytest.raises(InvalidRequestError):
        check_length("tenant", "é" * 65)
