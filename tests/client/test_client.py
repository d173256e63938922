"""The client library against a scripted gateway."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from kvrelay import errors
from kvrelay.client import AsyncClient, ChatMessage, Client, RequestState, WorkerRole
from kvrelay.client.requests import GenerateOptions, SamplingOptions
from kvrelay.core.job import FinishReason
from kvrelay.core.sampling_params import SamplingParams
from kvrelay.v1 import inference_pb2, session_pb2
from tests.support.fake_inference_service import (
    REQUEST_ID,
    FakeInferenceService,
    accepted,
    delta,
    finished,
    play,
    start_fake,
    then_break,
    then_raise,
)

WHOLE = (accepted(), delta(0, "a"), delta(1, "b"), delta(2, "c", last=True), finished())


@dataclass
class Fake:
    service: FakeInferenceService
    address: str


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    service = FakeInferenceService()
    bound, address = await start_fake(service)
    yield Fake(service, address)
    await bound.server.stop(None)


async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
    yield accepted()
    yield delta(0, "a")
    await asyncio.sleep(60)


@pytest.fixture
async def client(fake: Fake) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address, timeout_s=60) as client:
        yield client


async def test_a_stream_gives_deltas_then_usage_and_phases(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [play(*WHOLE)]
    stream = client.generate("hello", max_tokens=3, stop="x", seed=7, model="tiny")
    assert stream.accepted is None
    deltas = [item async for item in stream]
    assert [(item.index, item.text) for item in deltas] == [(0, "a"), (1, "b"), (2, "c")]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert stream.accepted is not None
    assert stream.accepted.request_id == REQUEST_ID
    assert stream.finished is not None
    assert stream.finished.usage.num_output_tokens == 3
    assert stream.finished.phases.transfer_bytes == 4096
    (request,) = fake.service.calls
    assert (request.text, request.model, request.sampling.max_tokens, list(request.sampling.stop)) == (
        "hello",
        "tiny",
        3,
        [b"x"],
    )
    assert request.idempotency_key == ""


async def test_complete_collects_every_sequence(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [
        play(
            accepted(),
            delta(0, "a", sequence=1),
            delta(0, "x"),
            delta(1, "b", sequence=1, last=True),
            delta(1, "y", last=True),
            finished(2),
        )
    ]
    completion = await client.complete(
        messages=[{"role": "user", "content": "hi"}, ChatMessage("assistant", "ho")], n=2
    )
    assert [output.text for output in completion.outputs] == ["xy", "ab"]
    assert completion.text == "xy"
    assert [(message.role, message.content) for message in fake.service.calls[0].chat.messages] == [
        ("user", "hi"),
        ("assistant", "ho"),
    ]


async def test_a_broken_stream_is_resumed_without_repetition(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_break(accepted(), delta(0, "a"), delta(1, ""))]
    fake.service.resume = [
        then_break(),
        then_break(accepted(), delta(0, "a")),
        play(accepted(), delta(0, "ab", num_tokens=3, last=True), finished()),
    ]
    stream = client.generate(token_ids=[1, 2], resumable=True)
    deltas = [item async for item in stream]
    assert [(item.index, len(item.tokens), item.text) for item in deltas] == [(0, 1, "a"), (1, 1, ""), (2, 1, "b")]
    assert await stream.text() == "ab"
    generate, *resumes = fake.service.calls
    assert generate.resumable
    assert generate.idempotency_key
    assert [(item.request_id, item.from_index) for item in resumes] == [(REQUEST_ID, 0)] * 3


async def test_text_that_was_held_back_at_the_break_is_not_lost(
    fake: Fake, client: AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    # The gateway held "st" back, which may have begun a stop string; the resumed stream cuts its
    # text elsewhere.
    fake.service.generate = [then_break(accepted(), delta(0, "one "), delta(1, ""))]
    fake.service.resume = [play(accepted(), delta(0, "on"), delta(1, "e step", last=True), finished())]
    with caplog.at_level("WARNING"):
        assert await client.generate("x", resumable=True).text() == "one step"
    assert "lost the stream" in caplog.text


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_a_connection_torn_by_something_in_between_is_resumed(
    fake: Fake, client: AsyncClient, code: grpc.StatusCode
) -> None:
    fake.service.generate = [then_break(accepted(), delta(0, "a"), code=code)]
    fake.service.resume = [play(*WHOLE)]
    assert await client.generate("x", resumable=True).text() == "abc"


async def test_a_call_that_a_stopping_gateway_never_began_is_sent_again(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_break(code=grpc.StatusCode.CANCELLED), play(*WHOLE)]
    assert await client.generate("x").text() == "abc"
    assert len(fake.service.calls) == 2


async def test_a_stream_that_a_stopping_gateway_cuts_off_is_unavailable_and_not_cancelled(
    fake: Fake, client: AsyncClient
) -> None:
    fake.service.generate = [then_break(accepted(), delta(0, "a"), code=grpc.StatusCode.CANCELLED)]
    with pytest.raises(errors.UnavailableError, match="cut the call off"):
        await client.generate("x").text()
    assert len(fake.service.calls) == 1, "it had begun, so that it is not sent again"


async def test_a_stream_that_just_ends_is_resumed(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [play(accepted(), delta(0, "a"))]
    fake.service.resume = [play(*WHOLE)]
    assert await client.generate("x", resumable=True).text() == "abc"


async def test_a_break_before_the_requests_id_sends_the_same_request_again(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_break(), play(*WHOLE)]
    assert await client.generate("x", resumable=True).text() == "abc"
    first, second = fake.service.calls
    assert first == second
    assert first.idempotency_key


@pytest.mark.parametrize("seed", [None, 7])
async def test_a_request_that_no_gateway_knows_any_more_is_made_again_with_its_seed(
    fake: Fake, client: AsyncClient, seed: int | None
) -> None:
    fake.service.generate = [
        then_break(accepted(), delta(0, "a")),
        then_break(),
        play(accepted(), delta(0, "ab", num_tokens=2), delta(2, "c", last=True), finished()),
    ]
    fake.service.resume = [then_raise(errors.RequestNotFoundError("never heard of it"))]
    options: dict[str, Any] = {} if seed is None else {"seed": seed}
    stream = client.generate("x", resumable=True, idempotency_key="key", **options)
    deltas = [item async for item in stream]
    assert [(item.index, len(item.tokens), item.text) for item in deltas] == [(0, 1, "a"), (1, 1, "b"), (2, 1, "c")]
    first, _, again, once_more = fake.service.calls
    assert again == once_more
    assert again.sampling.seed == 7
    assert (again.idempotency_key == first.idempotency_key) == (seed == 7), "with a seed it is another body"


async def test_a_resumed_stream_of_a_request_that_is_not_known_is_an_error(fake: Fake, client: AsyncClient) -> None:
    fake.service.resume = [then_break(accepted(), delta(0, "a")), then_raise(errors.RequestNotFoundError("forgotten"))]
    with pytest.raises(errors.RequestNotFoundError):
        await client.resume(REQUEST_ID).text()


async def test_a_stream_is_resumed_at_another_address(fake: Fake) -> None:
    other = FakeInferenceService()
    bound, address = await start_fake(other)
    fake.service.generate = [then_break(accepted(), delta(0, "a"))]
    other.resume = [play(*WHOLE)]
    async with AsyncClient([fake.address, address], timeout_s=60) as client:
        assert await client.generate("x", resumable=True).text() == "abc"
    assert len(other.calls) == 1
    await bound.server.stop(None)


async def test_without_resumable_a_broken_stream_is_an_error(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_break(accepted(), delta(0, "a"))]
    stream = client.generate("x")
    assert (await anext(stream)).text == "a"
    with pytest.raises(errors.UnavailableError):
        await anext(stream)
    assert len(fake.service.calls) == 1


async def test_a_gateway_that_says_unavailable_itself_is_believed(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_raise(errors.UnavailableError("no worker"), accepted())]
    fake.service.resume = [then_raise(errors.UnavailableError("no worker"), accepted(), delta(0, "a"))]
    with pytest.raises(errors.UnavailableError, match="no worker"):
        await client.complete("x", resumable=True)
    assert len(fake.service.calls) <= 3


@pytest.mark.parametrize("resumable", [False, True])
async def test_a_gateway_that_shuts_down_is_asked_again_until_its_successor_is_there(
    fake: Fake, client: AsyncClient, resumable: bool
) -> None:
    shutting_down = errors.UnavailableError("this gateway is shutting down", 1)
    fake.service.generate = [*[then_raise(shutting_down)] * 3, *[then_break()] * 3, play(*WHOLE)]
    assert await client.generate("x", resumable=resumable).text() == "abc"
    assert len(fake.service.calls) == 7


async def test_a_running_stream_of_a_gateway_that_shuts_down_goes_on_at_its_successor(
    fake: Fake, client: AsyncClient
) -> None:
    shutting_down = errors.UnavailableError("this gateway is shutting down", 1)
    fake.service.generate = [then_raise(errors.UnavailableError("resume it at another one"), accepted(), delta(0, "a"))]
    fake.service.resume = [*[then_raise(shutting_down)] * 2, then_break(), play(*WHOLE)]
    assert await client.generate("x", resumable=True).text() == "abc"
    assert len(fake.service.calls) == 5


async def test_a_request_that_nothing_has_begun_of_is_sent_to_another_address(fake: Fake) -> None:
    fake.service.generate = [play(*WHOLE)]
    async with AsyncClient(["127.0.0.1:1", fake.address], timeout_s=60) as client:
        assert await client.generate("x").text() == "abc"


async def test_resuming_ends_at_the_deadline(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_break(accepted(), delta(0, "a"))]
    fake.service.resume = [then_break()]
    with pytest.raises(errors.DeadlineError):
        await asyncio.wait_for(client.complete("x", resumable=True, timeout_s=2.0), 40)
    assert len(fake.service.calls) > 2


async def test_a_left_out_token_is_an_error(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [play(accepted(), delta(0, "a"), delta(2, "c"))]
    with pytest.raises(errors.InternalError, match="left out token 1"):
        await client.complete("x")


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("max_tokens", "is too large"),
        errors.ModelNotFoundError("no model x"),
        errors.NoChatTemplateError("no template"),
        errors.OverloadedError("full", 250),
        errors.CancelledRequestError("cancelled"),
        errors.IdempotencyConflictError("other body"),
    ],
)
async def test_errors_of_the_gateway_arrive_typed(fake: Fake, client: AsyncClient, error: errors.KvrelayError) -> None:
    fake.service.generate = [then_raise(error)]
    with pytest.raises(type(error)) as caught:
        await client.complete("x", resumable=True)
    assert caught.value.__dict__ == error.__dict__
    assert len(fake.service.calls) == 1


async def test_a_timeout_ends_a_silent_stream(fake: Fake, client: AsyncClient) -> None:
    cancelled = asyncio.Event()

    async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield accepted()
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    fake.service.generate = [silent]
    with pytest.raises(errors.DeadlineError):
        await client.complete("x", timeout_s=0.3)
    await asyncio.wait_for(cancelled.wait(), 30)


async def test_leaving_a_stream_cancels_it(fake: Fake, client: AsyncClient) -> None:
    cancelled = asyncio.Event()

    async def endless(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield accepted()
            yield delta(0, "a")
            await asyncio.sleep(60)
        finally:  # also where the client left before the handler went on from its delta
            cancelled.set()

    fake.service.generate = [endless]
    async with client.generate("x", resumable=True) as stream:
        async for _ in stream:
            break
    await asyncio.wait_for(cancelled.wait(), 30)


async def test_cancelling_a_stream_wakes_the_task_that_reads_it(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [endless]
    stream = client.generate("x", resumable=True)
    assert (await anext(stream)).text == "a"
    reader = asyncio.create_task(stream.text())
    await asyncio.sleep(0)
    await stream.cancel()
    with pytest.raises(errors.CancelledRequestError):
        await asyncio.wait_for(reader, 30)
    assert len(fake.service.calls) == 1


async def test_cancelling_the_reading_task_is_not_mistaken_for_a_broken_stream(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [endless]
    stream = client.generate("x", resumable=True)
    assert (await anext(stream)).text == "a"
    reader = asyncio.create_task(stream.text())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert len(fake.service.calls) == 1


async def test_nobody_there_is_said_at_once_and_names_the_address() -> None:
    async with AsyncClient("127.0.0.1:1", timeout_s=100) as client:
        with pytest.raises(errors.UnavailableError, match=r"cannot reach a gateway at 127\.0\.0\.1:1"):
            await asyncio.wait_for(client.complete("x", resumable=True), 50)
        with pytest.raises(errors.UnavailableError, match=r"cannot reach a gateway at 127\.0\.0\.1:1"):
            await client.cluster()


async def test_a_call_goes_to_the_next_address_when_one_does_not_answer(fake: Fake) -> None:
    fake.service.unary["ListModels"] = inference_pb2.ListModelsResponse()
    async with AsyncClient(f"127.0.0.1:1, {fake.address}", timeout_s=60) as client:
        assert await client.list_models() == []
        assert (await client.health()).serving


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "stop": ["\ud800"]}, "stop[0]"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"token_ids": [-1]}, "token_ids[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
    ],
)
async def test_what_cannot_be_sent_is_refused_with_the_fields_name(
    client: AsyncClient, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidRequestError) as caught:
        client.generate(**arguments)
    assert caught.value.field == field


async def test_an_unknown_sampling_parameter_is_a_type_error(client: AsyncClient) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate("a", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        await client.complete("a", temprature=1.0)  # type: ignore[call-arg]


def test_the_types_of_keyword_arguments_have_every_sampling_parameter_and_every_argument_of_generate() -> None:
    assert SamplingOptions.__annotations__.keys() == {field.name for field in fields(SamplingParams)}
    parameters = inspect.signature(AsyncClient.generate).parameters.values()
    own = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert GenerateOptions.__annotations__.keys() == SamplingOptions.__annotations__.keys() | own


async def test_an_empty_chat_is_left_to_the_server(fake: Fake, client: AsyncClient) -> None:
    fake.service.generate = [then_raise(errors.InvalidRequestError("chat.messages", "is empty"))]
    with pytest.raises(errors.InvalidRequestError, match="is empty"):
        await client.complete(messages=[])
    assert fake.service.calls[0].WhichOneof("prompt") == "chat"


async def test_resume_streams_from_any_index(fake: Fake, client: AsyncClient) -> None:
    fake.service.resume = [play(accepted(), delta(1, "b"), delta(2, "c", last=True), finished())]
    stream = client.resume(REQUEST_ID, 1)
    assert [item.index async for item in stream] == [1, 2]
    assert fake.service.calls[0].from_index == 1


async def echo(request: Any, context: Any) -> AsyncIterator[Any]:
    yield accepted()
    yield delta(0, request.messages[-1].content.upper(), last=True)
    yield finished()


async def test_a_conversation_answers_turn_by_turn(fake: Fake, client: AsyncClient) -> None:
    fake.service.converse = echo
    async with client.converse(model="tiny", temperature=0.0) as conversation:
        assert await conversation.send("hello").text() == "HELLO"
        turn = conversation.send([ChatMessage("user", "again")], max_tokens=5)
        assert [item.text async for item in turn] == ["AGAIN"]
        assert turn.finished is not None
    first, second = fake.service.calls
    assert (first.model, first.sampling.temperature, first.timeout_ms) == ("tiny", 0.0, 60000)
    assert (second.sampling.temperature, second.sampling.max_tokens) == (0.0, 5)


async def test_a_refused_turn_ends_the_conversation(fake: Fake, client: AsyncClient) -> None:
    fake.service.converse = then_raise(errors.NoChatTemplateError("no template"))
    async with client.converse() as conversation:
        with pytest.raises(errors.NoChatTemplateError):
            await conversation.send("hello").text()
        with pytest.raises(errors.KvrelayError):
            await conversation.send("hello").text()


async def half_a_turn(request: Any, context: Any) -> AsyncIterator[Any]:
    yield accepted()
    yield delta(0, "a")
    await asyncio.sleep(60)


async def test_closing_a_conversation_wakes_the_task_that_reads_a_turn(fake: Fake, client: AsyncClient) -> None:
    fake.service.converse = half_a_turn
    async with client.converse() as conversation:
        turn = conversation.send("hello")
        assert (await anext(turn)).text == "a"
        reader = asyncio.create_task(turn.text())
        await asyncio.sleep(0)
        conversation.close()
        with pytest.raises(errors.CancelledRequestError, match="the conversation is over"):
            await asyncio.wait_for(reader, 30)


async def test_what_is_known_about_requests_and_the_cluster_comes_as_values(fake: Fake, client: AsyncClient) -> None:
    info = inference_pb2.RequestInfo(request_id=REQUEST_ID, state=inference_pb2.REQUEST_STATE_DECODING, attempt=2)
    info.create_time.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    worker = inference_pb2.WorkerInfo(
        worker_id="w",
        role=inference_pb2.WORKER_ROLE_DECODE,
        connected=True,
        load=session_pb2.WorkerLoad(num_free_blocks=5),
    )
    fake.service.unary = {
        "GetRequest": inference_pb2.GetRequestResponse(request=info),
        "ListRequests": inference_pb2.ListRequestsResponse(requests=[info], next_page_token="more"),
        "CancelRequest": inference_pb2.CancelRequestResponse(state=inference_pb2.REQUEST_STATE_CANCELLED),
        "Tokenize": inference_pb2.TokenizeResponse(token_ids=[1, 2]),
        "Detokenize": inference_pb2.DetokenizeResponse(text="hi"),
        "GetCluster": inference_pb2.GetClusterResponse(
            workers=[worker], state_store=inference_pb2.STATE_STORE_HEALTH_DEGRADED, running_requests=[info]
        ),
    }
    request = await client.get_request(REQUEST_ID)
    assert (request.state, request.attempt, request.create_time) == (
        RequestState.DECODING,
        2,
        datetime(2026, 1, 2, tzinfo=UTC),
    )
    assert not request.state.final
    page = await client.list_requests(page_size=5, active_only=True)
    assert (page.requests, page.next_page_token) == ((request,), "more")
    assert (await client.cancel(REQUEST_ID)).final
    assert await client.tokenize("hi") == [1, 2]
    assert await client.detokenize([1, 2]) == "hi"
    cluster = await client.cluster()
    assert cluster.degraded
    assert (cluster.workers[0].role, cluster.workers[0].load.num_free_blocks) == (WorkerRole.DECODE, 5)
    fake.service.unary["GetRequest"] = errors.RequestNotFoundError("no such request")
    with pytest.raises(errors.RequestNotFoundError):
        await client.get_request("x")


class TestBlockingClient:
    """The same behaviour in threads; the scripted gateway runs in the test's loop."""

    async def test_a_broken_stream_is_resumed_without_repetition(self, fake: Fake) -> None:
        fake.service.generate = [then_break(accepted(), delta(0, "a"), delta(1, "b"))]
        fake.service.resume = [then_break(), play(*WHOLE)]

        def run() -> list[tuple[int, str]]:
            with Client(fake.address, timeout_s=60) as client, client.generate("x", resumable=True) as stream:
                deltas = [(item.index, item.text) for item in stream]
                assert stream.finished is not None
                assert stream.text() == "abc"
                return deltas

        assert await asyncio.to_thread(run) == [(0, "a"), (1, "b"), (2, "c")]

    async def test_errors_arrive_typed_and_timeouts_end_silence(self, fake: Fake) -> None:
        async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
            yield accepted()
            await asyncio.sleep(60)

        fake.service.generate = [then_raise(errors.ModelNotFoundError("no model")), silent]

        def run() -> None:
            with Client(fake.address) as client:
                with pytest.raises(errors.ModelNotFoundError):
                    client.complete("x")
                with pytest.raises(errors.DeadlineError):
                    client.complete("x", timeout_s=0.3)

        await asyncio.to_thread(run)

    async def test_a_conversation_answers_turn_by_turn(self, fake: Fake) -> None:
        fake.service.converse = echo

        def run() -> list[str]:
            with Client(fake.address, timeout_s=60) as client, client.converse() as conversation:
                return [conversation.send("one").text(), conversation.send("two").text()]

        assert await asyncio.to_thread(run) == ["ONE", "TWO"]

    async def test_a_turn_that_is_not_answered_ends_at_its_timeout(
        self, fake: Fake, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
            yield accepted()
            await asyncio.sleep(60)

        fake.service.converse = silent
        monkeypatch.setattr("kvrelay.client.sync_conversation.TURN_GRACE_S", 0.0)

        def run() -> None:
            with Client(fake.address) as client, client.converse() as conversation, pytest.raises(errors.DeadlineError):
                conversation.send("one", timeout_s=0.3).text()

        await asyncio.to_thread(run)

    async def test_cancelling_a_stream_wakes_the_thread_that_reads_it(self, fake: Fake) -> None:
        fake.service.generate = [endless]

        def run() -> None:
            with Client(fake.address, timeout_s=60) as client:
                stream = client.generate("x", resumable=True)
                assert next(stream).text == "a"
                timer = threading.Timer(0.1, stream.cancel)
                timer.start()
                with pytest.raises(errors.CancelledRequestError):
                    stream.text()
                timer.join()

        await asyncio.to_thread(run)
        assert len(fake.service.calls) == 1

    async def test_closing_a_conversation_wakes_the_thread_that_reads_a_turn(self, fake: Fake) -> None:
        fake.service.converse = half_a_turn

        def run() -> None:
            with Client(fake.address, timeout_s=60) as client, client.converse() as conversation:
                turn = conversation.send("hello")
                assert next(turn).text == "a"
                timer = threading.Timer(0.1, conversation.close)
                timer.start()
                with pytest.raises(errors.CancelledRequestError, match="the conversation is over"):
                    turn.text()
                timer.join()

        await asyncio.to_thread(run)

    async def test_plain_calls_answer(self, fake: Fake) -> None:
        fake.service.unary = {
            "Tokenize": inference_pb2.TokenizeResponse(token_ids=[4]),
            "GetCluster": inference_pb2.GetClusterResponse(gateway_id="g"),
        }

        def run() -> None:
            with Client(["127.0.0.1:1", fake.address]) as client:
                assert client.health().serving
                assert client.tokenize(messages=[ChatMessage("user", "a")]) == [4]
                assert client.cluster().gateway_id == "g"

        await asyncio.to_thread(run)
