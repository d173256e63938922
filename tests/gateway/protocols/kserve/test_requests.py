"""KServe's requests: what they become, and how errors name their fields."""

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gateway.protocols.kserve.requests import naming_inputs, parse
from gateway.protocols.kserve.sampling_json import parse_sampling_json
from gateway.protocols.kserve.tensors import Tensor, raw_texts
from gateway.requests.request_validation import parse_sampling
from kvrelay.errors import InvalidRequestError, KvrelayError, ModelNotFoundError
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.v1 import inference_pb2, session_pb2
from tests.fuzz.mutations import mutate_bytes
from tests.gateway.protocols.kserve.messages import infer_request

TEXT = "Why is the sky blue?"


@pytest.mark.parametrize("raw", [True, False])
def test_a_request_becomes_one_of_our_own(raw: bool) -> None:
    sampling: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "seed": 2**63,
        "stop": ["\n", "É"],
        "n": 2,
    }
    values: dict[str, str | bool] = {"text_input": TEXT, "stream": True, "sampling_parameters": json.dumps(sampling)}
    request = infer_request(
        values, raw=raw, model_name="tiny", id="a", parameters={"tenant": "t", "timeout": 1_500_000}
    )
    parsed = parse(request)
    expected = session_pb2.SamplingParams(**(sampling | {"stop": [b"\n", "É".encode()]}))
    assert parsed.generate == inference_pb2.GenerateRequest(model="tiny", text=TEXT, sampling=expected, tenant="t")
    assert (parsed.request_id, parsed.streams, parsed.timeout_s, parsed.num_sequences) == ("a", True, 1.5, 2)
    assert parsed.outputs == ("text_output", "finish_reason")
    assert not parsed.includes_input


def test_only_the_text_is_needed() -> None:
    parsed = parse(infer_request({"text_input": TEXT}))
    assert parsed.generate == inference_pb2.GenerateRequest(text=TEXT, sampling=session_pb2.SamplingParams())
    assert (parsed.streams, parsed.timeout_s, parsed.num_sequences) == (False, None, 1)


@pytest.mark.parametrize(
    ("values", "streams"),
    [
        ({"streaming": True}, True),
        ({"stream": False}, False),
        ({"stream": True, "streaming": True}, True),
    ],
)
def test_either_name_asks_for_a_stream(values: dict[str, bool], streams: bool) -> None:
    assert parse(infer_request({"text_input": TEXT, **values})).streams is streams


def test_outputs_are_chosen_by_name_or_by_inputs() -> None:
    named = ("num_output_tokens", "text_output")
    assert parse(infer_request({"text_input": TEXT}, outputs=named)).outputs == named
    flags = {"return_finish_reason": False, "return_num_input_tokens": True}
    assert parse(infer_request({"text_input": TEXT, **flags})).outputs == ("text_output", "num_input_tokens")
    with_logprobs = infer_request({"text_input": TEXT, "sampling_parameters": '{"logprobs": 0}'})
    assert parse(with_logprobs).outputs == ("text_output", "finish_reason", "logprobs")


def test_a_batch_dimension_of_one_is_taken() -> None:
    request = infer_request({"text_input": TEXT})
    request.inputs[0].shape[:] = [1, 1]
    assert parse(request).generate.text == TEXT


# --- errors ---------------------------------------------------------------------------------------


def changed(change: Callable[[pb.ModelInferRequest], object], **values: str | bool) -> pb.ModelInferRequest:
    request = infer_request({"text_input": TEXT, **values})
    change(request)
    return request


def sampled(parameters: str) -> pb.ModelInferRequest:
    return infer_request({"text_input": TEXT, "sampling_parameters": parameters})


WRONG: list[tuple[str, pb.ModelInferRequest]] = [
    ("text_input", infer_request({"stream": True})),
    ("text_input", infer_request({"text_input": ""})),
    ("text_input", infer_request({"text_input": b"\xff"})),
    ("text_input", infer_request({"text_input": True})),
    ("text_input", changed(lambda request: request.inputs[0].shape.append(2))),
    ("text_input", changed(lambda request: request.raw_input_contents.__setitem__(0, raw_texts(["a", "b"])))),
    ("text_input", changed(lambda request: request.raw_input_contents.__setitem__(0, b"\x09\0\0\0abc"))),
    ("text_input", changed(lambda request: request.raw_input_contents.__setitem__(0, b"\0\0"))),
    ("text_input", changed(lambda request: request.raw_input_contents.__setitem__(0, b""))),
    ("text_input", pb.ModelInferRequest(inputs=[Tensor(name="text_input", datatype="BYTES", shape=[1])])),
    ("text_input.parameters[x]", changed(lambda request: request.inputs[0].parameters["x"].SetInParent())),
    ("stream", changed(lambda request: request.raw_input_contents.__setitem__(1, b"\0\1"), stream=True)),
    ("stream", infer_request({"text_input": TEXT, "stream": "true"})),
    ("streaming", infer_request({"text_input": TEXT, "stream": True, "streaming": False})),
    ("exclude_input_in_output", infer_request({"text_input": TEXT, "stream": True, "exclude_input_in_output": False})),
    ("inputs[1].name", infer_request({"text_input": TEXT, "image": "x"})),
    ("stream", changed(lambda request: request.MergeFrom(infer_request({"stream": True})), stream=True)),
    ("outputs[0].name", infer_request({"text_input": TEXT}, outputs=("text",))),
    ("outputs[1].name", infer_request({"text_input": TEXT}, outputs=("text_output", "logprobs"))),
    ("outputs", infer_request({"text_input": TEXT}, outputs=("text_output",) * 6)),
    ("id", changed(lambda request: setattr(request, "id", "x" * 129))),
    ("text_input", changed(lambda request: request.inputs[0].shape.extend([1] * 100_000))),
    ("sampling_parameters", sampled('{"stop": "' + "x" * 2**18 + '"}')),
    ("sampling_parameters.stop", sampled('{"stop": [' + '"x",' * 16 + '"x"]}')),
    ("raw_input_contents", changed(lambda request: request.raw_input_contents.append(b""))),
    ("parameters[priority]", infer_request({"text_input": TEXT}, parameters={"priority": 1})),
    ("parameters[timeout]", infer_request({"text_input": TEXT}, parameters={"timeout": "soon"})),
    ("parameters[timeout]", infer_request({"text_input": TEXT}, parameters={"timeout": -1})),
    ("parameters[tenant]", infer_request({"text_input": TEXT}, parameters={"tenant": 5})),
    ("sampling_parameters", sampled("max_tokens=5")),
    ("sampling_parameters", sampled("[1]")),
    ("sampling_parameters", sampled("[" * 100_000)),
    ("sampling_parameters", sampled('{"max_tokens": 5, "max_tokens": 6}')),
    ("sampling_parameters.best_of", sampled('{"best_of": 2}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": -1}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": 1.5}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": true}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": "many"}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": 4294967296}')),
    ("sampling_parameters.max_tokens", sampled('{"max_tokens": Infinity}')),
    ("sampling_parameters.temperature", sampled('{"temperature": [0]}')),
    ("sampling_parameters.ignore_eos", sampled('{"ignore_eos": 1}')),
    ("sampling_parameters.stop[1]", sampled('{"stop": ["a", 5]}')),
    ("sampling_parameters.stop_token_ids[0]", sampled('{"stop_token_ids": ["x"]}')),
    ("sampling_parameters.logit_bias", sampled('{"logit_bias": [1]}')),
    ("sampling_parameters.logit_bias[x]", sampled('{"logit_bias": {"x": 1}}')),
    ("sampling_parameters.logit_bias[5]", sampled('{"logit_bias": {"5": "much"}}')),
]


@pytest.mark.parametrize(
    ("field", "request_"), WRONG, ids=[f"{number} {field}" for number, (field, _) in enumerate(WRONG)]
)
def test_errors_name_the_input(field: str, request_: pb.ModelInferRequest) -> None:
    with pytest.raises(InvalidRequestError) as failure:
        parse(request_)
    assert failure.value.field == field
    assert len(failure.value.problem) > 10


def test_unknown_fields_are_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"best_of is not known; these are: frequency_penalty, .*top_p"):
        parse_sampling_json('{"best_of": 2}')


def test_another_version_of_a_model_is_not_found() -> None:
    assert parse(infer_request({"text_input": TEXT}, model_version="1")).generate.text == TEXT
    with pytest.raises(ModelNotFoundError, match="one version, 1"):
        parse(infer_request({"text_input": TEXT}, model_version="2"))


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("prompt.text", "text_input"),
        ("prompt", "text_input"),
        ("sampling.max_tokens", "sampling_parameters.max_tokens"),
        ("sampling.stop[0]", "sampling_parameters.stop[0]"),
        ("tenant", "parameters[tenant]"),
        ("model", "model_name"),
        ("request", "request"),
    ],
)
def test_errors_name_fields_as_kserves_clients_know_them(field: str, name: str) -> None:
    with pytest.raises(InvalidRequestError) as failure, naming_inputs():
        raise InvalidRequestError(field, "is wrong")
    assert (failure.value.field, failure.value.problem) == (name, "is wrong")


def test_errors_quote_input_shortened() -> None:
    long = "x" * 1_000_000
    for request in (
        sampled(json.dumps({long: 1})),
        sampled(json.dumps({"temperature": long})),
        sampled(long),
        infer_request({"text_input": TEXT, long: "x"}),
        infer_request({"text_input": TEXT}, parameters={long: 1}),
        infer_request({"text_input": TEXT}, outputs=(long,)),
        infer_request({"text_input": TEXT}, model_version=long),
        changed(lambda request: request.inputs[0].shape.extend([7] * 10_000)),
    ):
        with pytest.raises(KvrelayError) as failure:
            parse(request)
        assert len(failure.value.message) < 1000


# --- sampling parameters --------------------------------------------------------------------------


def test_every_field_of_sampling_can_be_written_in_json() -> None:
    fields: dict[str, Any] = {
        **{
            "temperature": 0.5,
            "top_k": 5,
            "top_p": 0.5,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": -1,
        },
        **{
            "frequency_penalty": 1,
            "logit_bias": {"5": -1.5},
            "seed": 7,
            "stop": ["x"],
            "stop_token_ids": [3, 4],
            "n": 2,
        },
        **{"min_tokens": 1, "max_tokens": 9, "ignore_eos": True, "logprobs": 3},
    }
    if "response_format" in session_pb2.SamplingParams.DESCRIPTOR.fields_by_name:
        fields["response_format"] = {"regex": "[a-z]+"}
    message = parse_sampling_json(json.dumps(fields))
    assert {field.name for field, _ in message.ListFields()} == set(
        session_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    )
    assert (dict(message.logit_bias), list(message.stop), message.presence_penalty) == ({5: -1.5}, [b"x"], -1.0)


def test_numbers_may_be_written_as_texts_and_one_stop_string_without_a_list() -> None:
    message = parse_sampling_json(
        '{"temperature": "0.1", "max_tokens": "100", "top_k": 5.0, "stop": "x", "seed": null}'
    )
    assert message == session_pb2.SamplingParams(temperature=0.1, max_tokens=100, top_k=5, stop=[b"x"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(session_pb2.SamplingParams.DESCRIPTOR.fields_by_name)) | st.text(max_size=4)


@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_json_is_parsed_or_refused(values: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequestError):  # anything else is a defect
        parse_sampling(parse_sampling_json(json.dumps(values)))


def test_any_bytes_are_parsed_or_refused() -> None:
    generator = random.Random(1)
    values: dict[str, str | bool] = {
        "text_input": TEXT,
        "stream": True,
        "sampling_parameters": '{"max_tokens": 5, "stop": "x"}',
    }
    parameters: dict[str, str | int | bool] = {"timeout": 5, "tenant": "t"}
    raw, plain = (
        infer_request(values, raw=raw, outputs=("text_output",), parameters=parameters).SerializeToString()
        for raw in (True, False)
    )
    num_refused = num_taken = 0
    for _ in range(2000):
        data = mutate_bytes(*generator.choice(((raw, plain), (plain, raw))), generator)
        try:
            parse(pb.ModelInferRequest.FromString(data))
        except DecodeError:  # the server's interceptor refuses it
            continue
        except KvrelayError as failure:
            num_refused += len(failure.message) < 1000
        else:
            num_taken += 1
    assert num_refused > 100
    assert num_taken > 10
