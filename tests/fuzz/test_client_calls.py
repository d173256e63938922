"""Clients' calls with garbage: each gets a typed status that says what to do, and the next good
request gets its tokens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from kvrelay.errors import InvalidRequestError
from kvrelay.network.rpc import create_sync_channel
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from kvrelay.wire.errors import error_of_rpc
from tests.fuzz import corpus
from tests.fuzz.mutations import mutate_bytes, mutate_message
from tests.gateway.conftest import Bench, read_all, token_request
from tests.gateway.conftest import bench as bench  # a fixture
from tests.support.fake_workers import expected_token_ids

PROMPT = list(range(10, 30))
CALL_TIMEOUT_S = 2.0
CALLS_PER_BATCH = 50
SERVICE = "/kvrelay.v1.InferenceService/"

SAMPLING = session_pb2.SamplingParams(temperature=0.5, max_tokens=3, stop=[b"zz"], logit_bias={5: 1.0}, n=2, seed=3)
CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
SEEDS: dict[str, tuple[Message, ...]] = {
    "Generate": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=SAMPLING),
        pb.GenerateRequest(text="hello", sampling=SAMPLING, idempotency_key="k", tenant="t", resumable=True),
        pb.GenerateRequest(chat=CHAT, sampling=SAMPLING, coalesce_ms=2),
    ),
    "Converse": (pb.ConverseRequest(messages=CHAT.messages, sampling=SAMPLING, timeout_ms=1000),),
    "Resume": (pb.ResumeRequest(request_id="a" * 32, from_index=1),),
    "GetRequest": (pb.GetRequestRequest(request_id="a" * 32),),
    "ListRequests": (pb.ListRequestsRequest(page_size=5, page_token="1700000000000-abc"),),
    "CancelRequest": (pb.CancelRequestRequest(request_id="a" * 32),),
    "Tokenize": (pb.TokenizeRequest(text="hello"), pb.TokenizeRequest(chat=CHAT)),
    "Detokenize": (pb.DetokenizeRequest(token_ids=[5, 6, 7], keep_special_tokens=True),),
    "ListModels": (pb.ListModelsRequest(),),
    "GetCluster": (pb.GetClusterRequest(),),
}
NEVER = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
USUAL = (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
ODD_IDS = ("", "{", "}{", "a}b{c", "\0", "*", "x" * 100_000, "..", "\r\nFLUSHALL\r\n")


def odd_request(method: str, generator: random.Random) -> bytes:
    """By fields, or by bytes."""
    request = type(seed := generator.choice(SEEDS[method]))()
    request.CopyFrom(seed)
    if hasattr(request, "request_id") and generator.random() < 0.3:
        request.request_id = generator.choice(ODD_IDS)
    if generator.random() < 0.6 and request.DESCRIPTOR.fields:
        mutate_message(request, generator)
        return request.SerializeToString()
    return mutate_bytes(request.SerializeToString(), generator.choice(corpus.load("request")), generator)


def call(channel: grpc.Channel, method: str, requests: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """Status and details. Whatever the method's kind, it is one stream of bytes each way."""
    responses: Iterator[bytes] = channel.stream_stream(SERVICE + method)(iter(requests), timeout=CALL_TIMEOUT_S)  # type: ignore[arg-type]
    try:
        for _ in responses:
            pass
    except grpc.RpcError as failure:
        error: Any = failure
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            named = error_of_rpc(failure)
            assert isinstance(named, InvalidRequestError)
            assert named.field
            assert len(named.problem) > 5
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def bombard(channel: grpc.Channel, generator: random.Random, num_calls: int) -> Counter[grpc.StatusCode]:
    codes: Counter[grpc.StatusCode] = Counter()
    for _ in range(num_calls):
        # The cheap ones without fields say little.
        method = generator.choice(("Generate", "Generate", "Generate", "Converse", *SEEDS))
        requests = [
            odd_request(method, generator) for _ in range(generator.choice((1, 1, 3)) if method == "Converse" else 1)
        ]
        code, details = call(channel, method, requests)
        assert code not in NEVER, f"{method}: {code} {details!r} for {[request[:500].hex() for request in requests]}"
        assert code is grpc.StatusCode.OK or len(details) > 10, f"{method}: {code} {details!r}"
        codes[code] += 1
    return codes


@pytest.mark.parametrize("num_calls", [300, pytest.param(50_000, marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
async def test_odd_calls_get_typed_statuses_and_good_ones_their_tokens(
    bench: Bench, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.service.MODEL_WAIT_S", 0.01)  # for models of odd names
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    gateway = await bench.gateway(local_prefill_tokens=1000, worker_wait_ms=10)
    generator = random.Random(num_calls)
    codes: Counter[grpc.StatusCode] = Counter()
    with create_sync_channel(gateway.address) as channel:
        for _ in range(num_calls // CALLS_PER_BATCH):
            codes += await asyncio.to_thread(bombard, channel, generator, CALLS_PER_BATCH)
            answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4)))
            assert answer.token_ids[0] == expected_token_ids(PROMPT, 4)
    assert set(USUAL) <= set(codes), codes
    assert sum(codes[code] for code in USUAL) > 0.9 * codes.total(), codes
    await bench.at_rest()
    print(dict(codes))


async def test_a_call_without_any_request_ends_with_a_typed_status(bench: Bench) -> None:
    gateway = await bench.gateway(num_workers=0)
    with create_sync_channel(gateway.address) as channel:
        code, _ = await asyncio.to_thread(call, channel, "Converse", [])
    assert code is grpc.StatusCode.OK
