"""A model's sampling defaults fill what a request leaves open, once for all its attempts."""

import asyncio
from dataclasses import replace
from typing import Any

from kvrelay.client import AsyncClient
from kvrelay.core.sampling_params import SamplingDefaults, SamplingParams
from kvrelay.kserve import grpc_service_pb2_grpc
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from kvrelay.vllm_engine.messages import engine_grpc, engine_pb
from tests.gateway.api.test_service import answer_of, turn
from tests.gateway.conftest import Bench, Gateway, read_all
from tests.gateway.protocols.kserve.messages import infer_request
from tests.support.fake_workers import MODEL, FakeDecodeWorker

DEFAULTS = SamplingDefaults(temperature=0.25, top_k=20, top_p=0.75, min_p=0.125, repetition_penalty=1.5)
"""Numbers that a 32-bit float holds exactly."""
THE_MODELS = (0.25, 20, 0.75, 0.125, 1.5)
ALL_TOKENS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""kvrelay's own defaults, sent explicitly."""


def defaulted(sampling: SamplingParams) -> tuple[float, ...]:
    return (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty)


async def model_with_defaults(bench: Bench) -> tuple[FakeDecodeWorker, Gateway]:
    decode = await bench.workers.add_decode(replace(MODEL, sampling_defaults=DEFAULTS))
    await bench.announce(decode)
    return decode, await bench.gateway()


async def test_a_requests_own_sampling_overrides_the_models_defaults(
    bench: Bench,
) -> None:
    decode, gateway = await model_with_defaults(bench)
    for sampling in ({}, {"top_k": 0, "temperature": 0.0}, ALL_TOKENS):
        params = session_pb2.SamplingParams(max_tokens=2, **sampling)  # type: ignore[arg-type]
        await read_all(gateway.stub.Generate(pb.GenerateRequest(text="x", sampling=params)))
    assert [defaulted(sampling) for sampling in decode.samplings] == [
        THE_MODELS,
        (0.0, 0, 0.75, 0.125, 1.5),
        (1.0, 0, 1.0, 0.0, 1.0),
    ]


async def test_a_later_attempt_on_a_worker_with_other_defaults_is_sampled_as_the_first(bench: Bench) -> None:
    decode, gateway = await model_with_defaults(bench)
    decode.hold("token:3")
    reading = asyncio.create_task(read_all(gateway.stub.Generate(pb.GenerateRequest(text="x"))))
    await decode.wait_for("token:3")
    other = await bench.workers.add_decode(replace(MODEL, sampling_defaults=SamplingDefaults(temperature=2.0)))
    await bench.announce(other)
    await bench.kill(decode)
    await reading
    assert [defaulted(sampling) for sampling in other.samplings] == [THE_MODELS]


async def test_turns_of_a_conversation_take_the_models_defaults(bench: Bench) -> None:
    decode, gateway = await model_with_defaults(bench)
    call = gateway.stub.Converse()
    for message in (
        turn("one"),
        turn("two", sampling=session_pb2.SamplingParams(top_k=0, max_tokens=3)),
        turn("three"),
    ):
        await call.write(message)
        await answer_of(call)
    await call.done_writing()
    second = (0.25, 0, 0.75, 0.125, 1.5)
    assert [defaulted(sampling) for sampling in decode.samplings] == [THE_MODELS, second, second]


async def test_requests_over_kserves_protocol_take_the_models_defaults(bench: Bench) -> None:
    decode, gateway = await model_with_defaults(bench)
    stub: Any = grpc_service_pb2_grpc.GRPCInferenceServiceStub(gateway.channel)
    for sampling in ('{"max_tokens": 2}', '{"max_tokens": 2, "top_k": 0, "min_p": 0, "temperature": null}'):
        values: dict[str, str | bytes | bool] = {"text_input": "x", "sampling_parameters": sampling}
        await stub.ModelInfer(infer_request(values, model_name="tiny"))
    assert [defaulted(sampling) for sampling in decode.samplings] == [THE_MODELS, (0.25, 0, 0.75, 0.0, 1.5)]


async def test_requests_over_vllm_engine_take_the_models_defaults(bench: Bench) -> None:
    decode, gateway = await model_with_defaults(bench)
    stub: Any = engine_grpc.VllmEngineStub(gateway.channel)
    for params in (
        engine_pb.SamplingParams(max_tokens=2),
        engine_pb.SamplingParams(max_tokens=2, temperature=0.0, top_k=5),
    ):
        call = stub.Generate(engine_pb.GenerateRequest(request_id="a", text="x", sampling_params=params))
        assert [message async for message in call]
    assert [defaulted(sampling) for sampling in decode.samplings] == [THE_MODELS, (0.0, 5, 0.75, 0.125, 1.5)]
    info = await stub.GetModelInfo(engine_pb.GetModelInfoRequest())
    assert '"temperature": 0.25' in info.default_sampling_params_json


async def test_the_client_sends_only_given_fields_and_shows_the_models_defaults(bench: Bench) -> None:
    decode, gateway = await model_with_defaults(bench)
    async with AsyncClient(gateway.address) as client:
        (served,) = await client.list_models()
        assert served.model.sampling_defaults == DEFAULTS
        await client.complete("x", max_tokens=2)
        await client.complete("x", max_tokens=2, top_k=0, min_p=0.0, temperature=None)
    assert [defaulted(sampling) for sampling in decode.samplings] == [THE_MODELS, (0.25, 0, 0.75, 0.0, 1.5)]
