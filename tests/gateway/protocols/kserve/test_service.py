"""KServe's service over fake workers: one answer or many, concurrent requests, faults, errors."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from gateway.protocols.kserve.service import SERVICE_NAME
from kvrelay import errors
from kvrelay.kserve import grpc_service_pb2 as pb
from kvrelay.kserve import grpc_service_pb2_grpc
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.api.test_service import is_serving, one_worker
from tests.gateway.conftest import BOUND_S, Bench, Gateway, eventually
from tests.gateway.protocols.kserve.messages import infer_request, numbers_of, raw_of, texts_of
from tests.support.fake_workers import TOKENIZER, FakeDecodeWorker, expected_token_ids

TEXT = "Why is the sky blue?"


def stub_of(gateway: Gateway) -> Any:
    return grpc_service_pb2_grpc.GRPCInferenceServiceStub(gateway.channel)


def ask(num_tokens: int, text: str = TEXT, *, stream: bool = False, **fields: Any) -> pb.ModelInferRequest:
    """A greedy request; `sampling` overrides."""
    sampling = {"temperature": 0, "max_tokens": num_tokens} | fields.pop("sampling", {})
    values = {"text_input": text, "stream": stream, "sampling_parameters": json.dumps(sampling)} | fields.pop(
        "values", {}
    )
    return infer_request(values, **fields)


def expected_text(num_tokens: int, text: str = TEXT, sequence: int = 0) -> str:
    ids = expected_token_ids(TOKENIZER.encode(text).ids, num_tokens, sequence)
    return str(TOKENIZER.decode(ids))


def is_final(response: pb.ModelInferResponse) -> bool:
    return response.parameters["triton_final_response"].bool_param


async def streamed(
    gateway: Gateway,
    requests: Sequence[pb.ModelInferRequest],
    messages: dict[str, list[Any]] | None = None,
    **call: Any,
) -> dict[str, list[Any]]:
    """Adds the answers to these requests to `messages`, by request id."""
    messages = {} if messages is None else messages
    async with asyncio.timeout(BOUND_S):
        async for message in stub_of(gateway).ModelStreamInfer(iter_of(requests), **call):
            messages.setdefault(message.infer_response.id, []).append(message)
    return messages


async def iter_of(requests: Sequence[pb.ModelInferRequest]) -> AsyncIterator[pb.ModelInferRequest]:
    for request in requests:
        yield request


def check_stream(messages: Sequence[Any], num_tokens: int, text: str = TEXT) -> None:
    """The pieces add up; only the last is final and has the reason."""
    responses = [message.infer_response for message in messages]
    assert [message.error_message for message in messages] == [""] * len(messages)
    assert [is_final(response) for response in responses] == [False] * (len(responses) - 1) + [True]
    pieces = [texts_of(response, "text_output")[0] for response in responses]
    assert "".join(pieces) == expected_text(num_tokens, text)
    assert [texts_of(response, "finish_reason")[0] for response in responses] == [""] * (len(responses) - 1) + [
        "length"
    ]
    assert pieces[-1] != "", "the end of the text and of the request come together"


async def refused(call: Any) -> errors.KvrelayError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return error_of_rpc(failure.value)


async def test_one_answer_holds_all_of_the_output(bench: Bench) -> None:
    await bench.announce(await bench.workers.add_decode(), await bench.workers.add_prefill())
    stub = stub_of(gateway := await bench.gateway())
    response = await stub.ModelInfer(ask(5, model_name="tiny", id="mine"))
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "mine")
    assert texts_of(response, "text_output") == [expected_text(5)]
    assert texts_of(response, "finish_reason") == ["length"]
    assert is_final(response)

    named = ("num_output_tokens", "num_input_tokens", "text_output")
    request = ask(5, outputs=named, values={"exclude_input_in_output": False}, sampling={"n": 2})
    response = await stub.ModelInfer(request)
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        ("num_output_tokens", "UINT32", [2]),
        ("num_input_tokens", "UINT32", [1]),
        ("text_output", "BYTES", [2]),
    ]
    assert numbers_of(response, "num_output_tokens") == [5, 5]
    assert numbers_of(response, "num_input_tokens") == [len(TOKENIZER.encode(TEXT).ids)]
    assert texts_of(response, "text_output") == [TEXT + expected_text(5), TEXT + expected_text(5, sequence=1)]
    assert response.id == response.parameters["request_id"].string_param != ""
    assert await is_serving(gateway, SERVICE_NAME)
    await bench.at_rest()


async def test_requests_of_one_stream_run_concurrently(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway()
    decode.hold("token:6")
    texts = {f"r{number}": f"prompt {number}" for number in range(5)}
    requests = [ask(8, text, stream=True, id=name) for name, text in texts.items()]
    requests.append(ask(4, id="whole"))
    messages: dict[str, list[Any]] = {}
    reading = asyncio.create_task(streamed(gateway, requests, messages))

    async def all_have_begun() -> bool:
        # "whole" has ended, though it came last
        return messages.keys() == {*texts, "whole"} and len(decode.jobs) == len(texts)

    await eventually(all_have_begun)
    decode.release("token:6")
    await reading
    for name, text in texts.items():
        assert len(messages[name]) > 1
        check_stream(messages[name], 8, text)
    (whole,) = messages["whole"]
    check_stream([whole], 4)
    await bench.at_rest()


async def test_sequences_of_a_streamed_request_have_a_place_each(bench: Bench) -> None:
    await one_worker(bench)
    messages = (await streamed(await bench.gateway(), [ask(6, stream=True, id="two", sampling={"n": 2})]))["two"]
    texts = ["", ""]
    for message in messages:
        pieces = texts_of(message.infer_response, "text_output")
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [expected_text(6), expected_text(6, sequence=1)]
    assert texts_of(messages[-1].infer_response, "finish_reason") == ["length", "length"]


async def test_a_stream_continues_when_its_worker_dies(bench: Bench) -> None:
    first = await one_worker(bench)
    gateway = await bench.gateway()
    first.hold("token:3")
    reading = asyncio.create_task(streamed(gateway, [ask(8, stream=True, id="a")]))
    await first.wait_for("token:3")
    second = await one_worker(bench)
    await bench.kill(first)
    check_stream((await reading)["a"], 8)
    assert second.num_jobs == 1


async def test_a_failed_request_is_reported_in_the_stream_and_the_others_go_on(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    requests = [
        ask(10_000, id="too long"),
        ask(4, id="unknown", sampling={"best_of": 2}),
        ask(4, id="nowhere", model_name="huge"),
        ask(4, id="good", stream=True),
    ]
    messages = await streamed(gateway, requests)
    check_stream(messages["good"], 4)
    told = {}
    for name in ("too long", "unknown", "nowhere"):
        (message,) = messages[name]
        parameters = message.infer_response.parameters
        assert message.error_message
        assert is_final(message.infer_response)
        told[name] = (
            parameters["code"].string_param,
            parameters["reason"].string_param,
            parameters["field"].string_param,
        )
    assert told == {
        "too long": ("INVALID_ARGUMENT", "INVALID_REQUEST", "sampling_parameters.max_tokens"),
        "unknown": ("INVALID_ARGUMENT", "INVALID_REQUEST", "sampling_parameters.best_of"),
        "nowhere": ("NOT_FOUND", "MODEL_NOT_FOUND", ""),
    }


async def test_a_stream_that_asks_for_it_ends_with_the_status_of_a_failure(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    requests = [ask(4, id="bad", sampling={"temperature": -1})]
    error = await refused(streamed(gateway, requests, metadata=(("triton_grpc_error", "true"),)))
    assert isinstance(error, errors.InvalidRequestError)
    assert error.field == "sampling_parameters.temperature"
    await bench.at_rest()


async def test_a_wrong_request_gets_a_status_that_names_the_field(bench: Bench) -> None:
    decode = await one_worker(bench)
    stub = stub_of(await bench.gateway())
    for field, request in {
        "text_input": ask(4, "x" * 600),
        "stream": ask(4, stream=True),
        "sampling_parameters.max_tokens": ask(10_000),
        "sampling_parameters.stop[0]": ask(4, sampling={"stop": [""]}),
        "parameters[tenant]": ask(4, parameters={"tenant": "x" * 129}),
    }.items():
        error = await refused(stub.ModelInfer(request))
        assert isinstance(error, errors.InvalidRequestError), (field, error)
        assert error.field == field
    assert isinstance(await refused(stub.ModelInfer(ask(4, model_name="huge"))), errors.ModelNotFoundError)
    assert isinstance(
        await refused(stub.ModelMetadata(pb.ModelMetadataRequest(name="huge"))), errors.ModelNotFoundError
    )
    assert decode.num_jobs == 0


async def test_load_over_the_bound_is_refused_with_a_retry_time(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway(max_running_requests=1)
    decode.hold("token:2")
    running = asyncio.create_task(streamed(gateway, [ask(4, stream=True, id="a")]))
    await decode.wait_for("token:2")
    error = await refused(stub_of(gateway).ModelInfer(ask(4)))
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_ms > 0
    (message,) = (await streamed(gateway, [ask(4, id="b")]))["b"]
    parameters = message.infer_response.parameters
    assert parameters["code"].string_param == "RESOURCE_EXHAUSTED"
    assert parameters["retry_after_ms"].int64_param > 0
    decode.release("token:2")
    check_stream((await running)["a"], 4)


async def test_a_requests_own_timeout_is_its_deadline(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway()
    decode.hold("token:2")
    error = await refused(stub_of(gateway).ModelInfer(ask(4, parameters={"timeout": 200_000})))
    assert isinstance(error, errors.DeadlineError)
    await bench.at_rest()


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_a_client_that_disconnects_cancels_its_requests(bench: Bench, method: str) -> None:
    decode = await one_worker(bench)
    stub = stub_of(await bench.gateway())
    decode.hold("token:3")
    call = (
        stub.ModelInfer(ask(8))
        if method == "ModelInfer"
        else stub.ModelStreamInfer(iter_of([ask(8, id="a"), ask(8, id="b")]))
    )
    await decode.wait_for("token:3")
    call.cancel()
    await bench.at_rest()
    await cancels(decode)


async def cancels(decode: FakeDecodeWorker) -> None:
    async def told() -> bool:
        return decode.num_cancels > 0

    await eventually(told)


async def test_models_are_described_while_their_workers_are_connected(bench: Bench) -> None:
    empty = stub_of(await bench.gateway())
    assert (await empty.ServerLive(pb.ServerLiveRequest())).live
    assert not (await empty.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await empty.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    await one_worker(bench)
    stub = stub_of(gateway := await bench.gateway())
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny", version="2"))).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="huge"))).ready
    server = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert server.name == "kvrelay"
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert [tensor.name for tensor in metadata.inputs][:4] == [
        "text_input",
        "stream",
        "streaming",
        "sampling_parameters",
    ]
    assert [tensor.name for tensor in metadata.outputs][:2] == ["text_output", "finish_reason"]
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="tiny"))).config
    assert config.model_transaction_policy.decoupled
    assert [tensor.name for tensor in config.input if not tensor.optional] == ["text_input"]
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    assert [(model.name, model.state) for model in index.models] == [("tiny", "READY")]
    await gateway.stop()


async def test_log_probabilities_come_with_their_tokens(bench: Bench) -> None:
    await one_worker(bench)
    response = await stub_of(await bench.gateway()).ModelInfer(ask(3, sampling={"logprobs": 1}))
    (text,) = texts_of(response, "logprobs")
    assert [token["token_id"] for token in json.loads(text)] == expected_token_ids(TOKENIZER.encode(TEXT).ids, 3)
    assert raw_of(response, "logprobs")
