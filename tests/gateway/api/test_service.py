"""The other RPCs: bad input, overload, conversations, views, draining, health, a store that is
away.
"""

import asyncio
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.main import STATE_STORE_NAME, serve
from gateway.requests.request_validation import MAX_MESSAGES
from gateway.requests.starter import DRAINING_RETRY_MS
from gateway.service import MAX_TOKENS_PER_CALL
from kvrelay import errors
from kvrelay.client import AsyncClient
from kvrelay.config.settings import GatewaySettings, ServerSettings
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from kvrelay.wire.errors import error_of_rpc
from tests.gateway.conftest import (
    Answer,
    Bench,
    Gateway,
    eventually,
    read_all,
    read_into,
    running_gateway,
    token_request,
)
from tests.support.fake_workers import MODEL, TOKENIZER, FakeDecodeWorker, expected_token_ids
from tests.support.redis_fixtures import stopped
from tests.support.small_tokenizer import tokenizer_files

PROMPT = list(range(10, 50))
CHAT = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])


async def one_worker(bench: Bench) -> FakeDecodeWorker:
    decode = await bench.workers.add_decode()
    await bench.announce(decode)
    return decode


async def error_of(call: object) -> errors.KvrelayError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await read_all(call)
    return error_of_rpc(failure.value)


# --- bad input ------------------------------------------------------------------------------------

INVALID = {
    "prompt": pb.GenerateRequest(),
    "prompt.text": pb.GenerateRequest(text=""),
    "prompt.token_ids": pb.GenerateRequest(token_ids=pb.TokenIds()),
    "prompt.token_ids[1]": token_request([1, 100_000]),
    "prompt.chat.messages": pb.GenerateRequest(chat=pb.ChatMessages()),
    "prompt.chat.messages ": pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="wizard", content="x")])
    ),
    "sampling.max_tokens": token_request(PROMPT, 10_000),
    "sampling.temperature": token_request(PROMPT, sampling_temperature=float("nan")),
    "sampling.n": token_request(PROMPT, sampling_n=9),
    "sampling.stop[0]": token_request(PROMPT, sampling_stop=[b"\xff"]),
    "sampling.stop_token_ids[0]": token_request(PROMPT, sampling_stop_token_ids=[100_000]),
    "tenant": token_request(PROMPT, tenant="x" * 129),
    "idempotency_key": token_request(PROMPT, idempotency_key="x" * 129),
}


async def test_bad_input_is_refused_by_name_before_any_worker_is_asked(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway()
    too_long = token_request([1] * 512)
    for field, request in [*INVALID.items(), ("prompt", too_long)]:
        error = await error_of(gateway.stub.Generate(request))
        assert isinstance(error, errors.InvalidRequestError), (field, error)
        assert error.field == field.strip()
    assert decode.num_jobs == 0
    await read_all(gateway.stub.Generate(token_request(PROMPT)))


async def test_unknown_models_and_requests_are_not_found(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    error = await error_of(gateway.stub.Generate(token_request(PROMPT, model="huge")))
    assert isinstance(error, errors.ModelNotFoundError)
    assert "tiny" in error.message
    assert isinstance(
        await error_of(gateway.stub.Resume(pb.ResumeRequest(request_id="x"))), errors.RequestNotFoundError
    )
    for call in (
        gateway.stub.GetRequest(pb.GetRequestRequest(request_id="x")),
        gateway.stub.CancelRequest(pb.CancelRequestRequest(request_id="x")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_long_names_and_ids_are_quoted_shortened(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    long = "né" * 10_000
    calls: list[Any] = [
        gateway.stub.GetRequest(pb.GetRequestRequest(request_id=long)),
        gateway.stub.CancelRequest(pb.CancelRequestRequest(request_id=long)),
        gateway.stub.GetTimeline(pb.GetTimelineRequest(request_id=long)),
        gateway.stub.Tokenize(pb.TokenizeRequest(model=long, text="x")),
    ]
    failures = [await error_of(gateway.stub.Generate(token_request(PROMPT, model=long)))]
    failures.append(await error_of(gateway.stub.Resume(pb.ResumeRequest(request_id=long))))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        failures.append(error_of_rpc(failure.value))
    for error in failures:
        assert isinstance(error, errors.InvalidRequestError | errors.RequestNotFoundError), error
        assert len(error.message) < 300


async def test_a_message_above_the_gateways_bound_is_not_even_read(bench: Bench) -> None:
    gateway = await bench.gateway()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await gateway.stub.Tokenize(pb.TokenizeRequest(text="x" * (1024 * 1024 + 1)))
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (failure.value.details() or "")


async def test_chat_needs_a_template_and_text_a_tokenizer(bench: Bench) -> None:
    plain = await bench.workers.add_decode(
        replace(MODEL, name="plain", fingerprint="1"), tokenizer_files(chat_template=None)
    )
    bare = await bench.workers.add_decode(replace(MODEL, name="bare", fingerprint="2"), {})
    await bench.announce(plain, bare)
    gateway = await bench.gateway()
    error = await error_of(gateway.stub.Generate(pb.GenerateRequest(model="plain", chat=CHAT)))
    assert isinstance(error, errors.NoChatTemplateError)
    error = await error_of(gateway.stub.Generate(pb.GenerateRequest(model="bare", text="x")))
    assert isinstance(error, errors.PreconditionError)
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 4, model="bare")))
    assert answer.token_ids[0] == expected_token_ids(PROMPT, 4)
    assert answer.texts[0] == ""
    error = await error_of(gateway.stub.Generate(token_request(PROMPT, 4, model="bare", sampling_stop=[b"x"])))
    assert isinstance(error, errors.PreconditionError)
    assert isinstance(await error_of(gateway.stub.Generate(token_request(PROMPT))), errors.InvalidRequestError)


async def test_load_over_the_bound_is_refused_with_a_retry_time(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway(max_running_requests=1)
    decode.hold("token:3")
    call = gateway.stub.Generate(token_request(PROMPT))
    await read_into(Answer(), call, until=3)
    error = await error_of(gateway.stub.Generate(token_request(PROMPT)))
    assert isinstance(error, errors.OverloadedError)
    assert error.retry_after_ms > 0
    error = await error_of(gateway.stub.Generate(pb.GenerateRequest()))
    assert isinstance(error, errors.OverloadedError), "it is refused before its prompt is looked at"
    decode.release("token:3")
    call.cancel()
    await bench.at_rest()
    await read_all(gateway.stub.Generate(token_request(PROMPT)))


# --- conversations --------------------------------------------------------------------------------


def turn(text: str, **fields: object) -> pb.ConverseRequest:
    return pb.ConverseRequest(messages=[pb.ChatMessage(role="user", content=text)], **fields)  # type: ignore[arg-type]


async def answer_of(call: grpc.aio.StreamStreamCall[pb.ConverseRequest, pb.ConverseResponse]) -> Answer:
    answer = Answer()
    async with asyncio.timeout(30):
        while answer.finished is None:
            frame = await call.read()
            assert frame is not grpc.aio.EOF
            answer.add(frame)
    return answer


async def test_a_conversations_prompt_continues_its_earlier_tokens_on_the_same_worker(bench: Bench) -> None:
    await bench.announce(
        await bench.workers.add_decode(), await bench.workers.add_decode(), await bench.workers.add_prefill()
    )
    gateway = await bench.gateway()
    sampling = session_pb2.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    call = gateway.stub.Converse()
    await call.write(turn("one", sampling=sampling))
    first = await answer_of(call)
    await call.write(turn("two"))
    second = await answer_of(call)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    used = [
        worker for worker in bench.workers.workers if isinstance(worker, FakeDecodeWorker) and worker.reserved_prompts
    ]
    assert len(used) == 1, "the same decode worker"
    prompts = used[0].reserved_prompts
    assert prompts[1][: len(prompts[0]) + 4] == (*prompts[0], *first.token_ids[0])
    rendered = TOKENIZER.decode(list(prompts[1]), skip_special_tokens=False)
    assert rendered == (
        f"<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{first.texts[0]}<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(second.token_ids[0]) == 4, "sampling as in the turn before"
    await bench.at_rest()


async def test_a_conversation_that_breaks_off_frees_its_turn(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway()
    decode.hold("token:3")
    call = gateway.stub.Converse()
    await call.write(turn("one"))
    await decode.wait_for("token:3")
    call.cancel()
    await bench.at_rest()


async def test_a_refused_turn_ends_the_conversation_with_its_error(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    call = gateway.stub.Converse()
    await call.write(pb.ConverseRequest())
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- views ----------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_are_inverse(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    tokens = await gateway.stub.Tokenize(pb.TokenizeRequest(text="Hello 🎉"))
    assert (await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == "Hello 🎉"
    chat = await gateway.stub.Tokenize(pb.TokenizeRequest(chat=CHAT))
    kept = await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=chat.token_ids, keep_special_tokens=True))
    assert kept.text.startswith("<|im_start|>user")


async def answer_to(
    gateway: Gateway, request: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest
) -> object:
    if isinstance(request, pb.GenerateRequest):
        return await read_all(gateway.stub.Generate(request))
    if isinstance(request, pb.TokenizeRequest):
        return await gateway.stub.Tokenize(request)
    return await gateway.stub.Detokenize(request)


async def test_texts_far_beyond_the_context_are_refused_by_every_call_and_others_are_served(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway()
    long = "word " * 200_000
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=long)])
    crowd = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")] * (MAX_MESSAGES + 1))
    calls: dict[str, list[pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest]] = {
        "prompt": [pb.GenerateRequest(text=long), pb.GenerateRequest(chat=chat), token_request([1] * 1_000_000)],
        "prompt.chat.messages": [pb.GenerateRequest(chat=crowd)],
        "input.text": [pb.TokenizeRequest(text=long)],
        "input.chat.messages": [pb.TokenizeRequest(chat=crowd)],
        "token_ids": [pb.DetokenizeRequest(token_ids=[1] * (MAX_TOKENS_PER_CALL + 1))],
    }
    for field, requests in calls.items():
        for request in requests:
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await answer_to(gateway, request)
            error = error_of_rpc(failure.value)
            assert isinstance(error, errors.InvalidRequestError), (field, error)
            assert error.field == field
    assert decode.num_jobs == 0
    await read_all(gateway.stub.Generate(token_request(PROMPT)))


async def test_models_and_cluster_show_what_is_there(bench: Bench) -> None:
    prefill, decode = await bench.workers.add_prefill(), await bench.workers.add_decode()
    await bench.announce(prefill, decode)
    gateway = await bench.gateway()
    (model,) = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.model.name, model.num_prefill_workers, model.num_decode_workers, model.has_chat_template) == (
        "tiny",
        1,
        1,
        True,
    )
    decode.hold("token:3")
    call = gateway.stub.Generate(token_request(PROMPT))
    answer = Answer()
    await read_into(answer, call, until=3)
    cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
    assert {worker.worker_id for worker in cluster.workers} == {prefill.worker_id, decode.worker_id}
    assert all(worker.connected and worker.load.num_blocks == 100 for worker in cluster.workers)
    (request,) = cluster.running_requests
    assert request.state == pb.REQUEST_STATE_DECODING
    assert (request.decode_worker_id, request.prefill_worker_id) == (decode.worker_id, prefill.worker_id)
    assert request.num_output_tokens == 3
    assert cluster.state_store == pb.STATE_STORE_HEALTH_OK
    assert [other.num_running_requests for other in cluster.gateways] == [1]
    decode.release("token:3")
    await read_into(answer, call)


async def test_requests_are_listed_page_by_page(bench: Bench) -> None:
    await one_worker(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    ids = []
    for _ in range(3):
        answer = await read_all(gateway.stub.Generate(token_request(PROMPT, 2)))
        assert answer.accepted is not None
        ids.append(answer.accepted.request_id)

    async def all_listed() -> bool:
        listed = await other.stub.ListRequests(pb.ListRequestsRequest())
        return {request.request_id for request in listed.requests} == set(ids)

    await eventually(all_listed)
    first = await other.stub.ListRequests(pb.ListRequestsRequest(page_size=2))
    rest = await other.stub.ListRequests(pb.ListRequestsRequest(page_size=2, page_token=first.next_page_token))
    assert len(first.requests) == 2
    assert len(rest.requests) == 1
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await other.stub.ListRequests(pb.ListRequestsRequest(page_size=1001))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# --- the process ----------------------------------------------------------------------------------


async def is_serving(gateway: Gateway, service: str = "") -> bool:
    stub: Any = health_pb2_grpc.HealthStub(gateway.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_health_tells_about_the_process_and_its_store(bench: Bench) -> None:
    await one_worker(bench)
    gateway = await bench.gateway()
    assert await is_serving(gateway)
    assert await is_serving(gateway, "kvrelay.v1.InferenceService")
    await eventually(lambda: is_serving(gateway, STATE_STORE_NAME))
    with stopped(bench.valkey):

        async def degraded() -> bool:
            return not await is_serving(gateway, STATE_STORE_NAME)

        await eventually(degraded)
        assert await is_serving(gateway)
    await eventually(lambda: is_serving(gateway, STATE_STORE_NAME))


@pytest.mark.parametrize("exposure", ["danger", None])
async def test_an_exposed_gateway_says_so_in_its_health(
    bench: Bench, exposure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.main.exposure_of_gateway", lambda *_: exposure)
    gateway = await bench.gateway()
    async with AsyncClient(gateway.address) as client:
        assert (await client.health()).insecure is (exposure is not None)


async def test_a_draining_gateway_takes_nothing_new_and_lets_running_requests_end(bench: Bench) -> None:
    decode = await one_worker(bench)
    gateway = await bench.gateway(http=True)
    decode.hold("token:3")
    call = gateway.stub.Generate(token_request(PROMPT, 8))
    answer = Answer()
    await read_into(answer, call, until=3)
    stopping = asyncio.create_task(gateway.stop())

    async def draining() -> bool:
        return not await is_serving(gateway)

    await eventually(draining)
    error = await error_of(gateway.stub.Generate(token_request(PROMPT)))
    assert isinstance(error, errors.UnavailableError)
    assert error.retry_after_ms == DRAINING_RETRY_MS
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.http_url}/metrics") as page:
        assert 'kvrelay_requests_refused_total{reason="UNAVAILABLE"} 1.0\n' in await page.text()
    decode.release("token:3")
    await read_into(answer, call)
    assert answer.token_ids[0] == expected_token_ids(PROMPT, 8)
    await stopping


async def test_a_silent_worker_is_lost_after_the_window_and_its_request_goes_on_elsewhere(bench: Bench) -> None:
    first = await one_worker(bench)
    gateway = await bench.gateway()
    first.hold("token:3")
    reading = asyncio.create_task(read_all(gateway.stub.Generate(token_request(PROMPT))))
    await first.wait_for("token:3")
    second = await one_worker(bench)
    first.fall_silent()
    answer = await reading
    assert answer.token_ids[0] == expected_token_ids(PROMPT, 8)
    assert second.num_jobs == 1


async def test_a_gateway_starts_without_its_store_and_finds_workers_when_it_comes(bench: Bench) -> None:
    await one_worker(bench)
    with stopped(bench.valkey):
        gateway = await bench.gateway(num_workers=0)
        cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
        assert cluster.state_store == pb.STATE_STORE_HEALTH_DEGRADED
        error = await error_of(gateway.stub.Generate(token_request(PROMPT)))
        assert isinstance(error, errors.ModelNotFoundError)

    async def served() -> bool:
        return bool((await read_all(gateway.stub.Generate(token_request(PROMPT)))).finished)

    await eventually(served)


async def test_a_taken_port_stops_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = GatewaySettings(server=ServerSettings(port=port, redis_url="redis://127.0.0.1:1/0"))
        with pytest.raises(errors.StartupError, match=str(port)):
            await serve(settings, asyncio.Event())


async def test_a_missing_redis_url_stops_the_start() -> None:
    with pytest.raises(errors.ConfigError, match="redis-url"):
        await serve(GatewaySettings(), asyncio.Event())


async def test_a_gateway_starts_with_an_unreachable_redis() -> None:
    async with running_gateway("redis://127.0.0.1:1/0") as gateway:
        cluster = await gateway.stub.GetCluster(pb.GetClusterRequest())
        assert cluster.state_store == pb.STATE_STORE_HEALTH_DEGRADED


def test_the_gateway_imports_neither_torch_nor_transformers() -> None:
    imports = "import sys, gateway.main, gateway.__main__"
    code = f"{imports}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
