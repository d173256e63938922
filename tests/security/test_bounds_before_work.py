"""What is refused for its size is refused before it is walked: hardly a call, hardly a byte.

Calls of Python and allocated bytes are counted, which no load of the machine changes.
"""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from gateway.protocols.kserve.requests import parse as parse_kserve
from gateway.requests.request_validation import MAX_MESSAGES, check_prompt_token_ids, parse_request
from gateway.workers.served_models import ModelLimits, select_model
from kvrelay.core.job_validation import check_num_tokens
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.errors import InvalidRequestError
from kvrelay.kserve import grpc_service_pb2 as kserve_pb
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2

MAX_CALLS = 200
MAX_BYTES = 64 * 1024
COPY_BYTES = 2 * 2**20 + MAX_BYTES
"""Protobuf copies a text, of 1 or 2 MB here, where it is read."""
MANY = 500_000
MODEL = ModelSpec("tiny", "llama", KVLayout(2, 2, 16, "float32"), 320, 512, (0,), "f")
LIMITS = ModelLimits(MODEL, 512)


def generate(**fields: Any) -> Callable[[], object]:
    message = pb.GenerateRequest(**{"text": "hi", **fields})
    return lambda: parse_request(message)


def sampled(**fields: Any) -> Callable[[], object]:
    return generate(sampling=session_pb2.SamplingParams(**fields))


def infer(**fields: Any) -> Callable[[], object]:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], **fields.pop("tensor", {})}
    message = kserve_pb.ModelInferRequest(inputs=[kserve_pb.ModelInferRequest.InferInputTensor(**tensor)], **fields)
    return lambda: parse_kserve(message)


def prompt() -> Callable[[], object]:
    ids = pb.TokenIds(ids=[1] * MANY).ids
    return lambda: check_prompt_token_ids(ids, "prompt.token_ids", LIMITS)


TEXT = b"\x02\0\0\0hi"
CASES: dict[str, Callable[[], object]] = {
    "stop strings": sampled(stop=[b"x"] * MANY),
    "stop tokens": sampled(stop_token_ids=[1] * MANY),
    "biases": sampled(logit_bias=dict.fromkeys(range(MANY), 1.0)),
    "messages": generate(text=None, chat=pb.ChatMessages(messages=[pb.ChatMessage(role="u")] * (MAX_MESSAGES + 1))),
    "prompt tokens": prompt(),
    "model": lambda: select_model("\x01" * 2**20, [LIMITS]),
    "tenant": generate(tenant="t" * 2**20),
    "idempotency key": generate(idempotency_key="t" * 2**20),
    "shape": infer(tensor={"shape": [1] * MANY}, raw_input_contents=[TEXT]),
    "elements": infer(raw_input_contents=[bytes(4 * MANY)]),
    "outputs": infer(
        raw_input_contents=[TEXT],
        outputs=[kserve_pb.ModelInferRequest.InferRequestedOutputTensor(name="text_output")] * 10_000,
    ),
    "job's tokens": lambda: check_num_tokens(MANY, MODEL),
}


COPIED = {"model", "tenant", "idempotency key", "elements"}


@pytest.mark.parametrize("case", CASES)
def test_what_is_too_much_is_refused_without_a_walk(case: str) -> None:
    num_calls, num_bytes = cost_of(CASES[case])
    assert num_calls < MAX_CALLS
    assert num_bytes < (COPY_BYTES if case in COPIED else MAX_BYTES)


def test_lists_of_vllm_engine_are_refused_without_a_walk() -> None:
    pytest.importorskip("smg_grpc_proto")
    from kvrelay.vllm_engine.messages import engine_pb
    from kvrelay.vllm_engine.sampling import sampling_from_vllm

    for fields in (
        {"stop": ["x"] * MANY},
        {"stop_token_ids": [1] * MANY},
        {"logit_bias": dict.fromkeys(range(MANY), 1)},
    ):
        message = engine_pb.SamplingParams(**fields)
        num_calls, num_bytes = cost_of(lambda message=message: sampling_from_vllm(message))  # type: ignore[misc]
        assert num_calls < MAX_CALLS
        assert num_bytes < MAX_BYTES


def cost_of(refuse: Callable[[], object]) -> tuple[int, int]:
    """Calls of Python and peak of allocated bytes, where it refuses."""
    num_calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event == "call"

    tracemalloc.start()
    sys.setprofile(count)
    try:
        with pytest.raises(InvalidRequestError) as refusal:
            refuse()
    finally:
        sys.setprofile(None)
        num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(refusal.value.message) < 300
    return num_calls, num_bytes
