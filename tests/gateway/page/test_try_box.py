"""The prompt box of the live page, over fake workers and real gateways."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from google.protobuf.json_format import ParseDict

from gateway.page import try_box
from kvrelay.config.settings import GatewaySettings, RequestSettings, ServerSettings
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import session_pb2
from tests.gateway.conftest import Answer, Bench, Gateway, read_all
from tests.support import fake_workers, left_out
from tests.support.fake_workers import MODEL, FakeDecodeWorker
from tests.support.small_tokenizer import tokenizer_files
from tools.browser_page import open_page
from tools.headless_chromium import find_chromium

TEXT = "What is the capital of France?"
NUM_TOKENS = 12
URL = "/api/try"


async def one_worker(bench: Bench, *, chat_template: bool = True, **gateway: Any) -> tuple[FakeDecodeWorker, Gateway]:
    files = tokenizer_files() if chat_template else tokenizer_files(chat_template=None)
    decode = await bench.workers.add_decode(MODEL, files)
    await bench.announce(decode)
    return decode, await bench.gateway(http=True, **gateway)


@asynccontextmanager
async def trying(gateway: Gateway, **body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.http_url + URL, json={"text": TEXT, "max_tokens": NUM_TOKENS} | body) as response,
    ):
        yield response


async def lines_of(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in response.content]


async def answer_of(gateway: Gateway, **body: Any) -> Answer:
    """The whole answer, checked like a gRPC stream."""
    answer = Answer()
    async with trying(gateway, **body) as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson"), await response.text()
        for line in await lines_of(response):
            answer.add(ParseDict(line, pb.GenerateResponse()))
    assert answer.finished is not None
    return answer


async def client_answer(gateway: Gateway, **prompt: Any) -> Answer:
    sampling = session_pb2.SamplingParams(max_tokens=NUM_TOKENS)
    return await read_all(gateway.stub.Generate(pb.GenerateRequest(sampling=sampling, **prompt)))


def chat(text: str) -> pb.ChatMessages:
    return pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=text)])


async def first_line(response: aiohttp.ClientResponse) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(await response.content.readline())
    return line


# --- answers --------------------------------------------------------------------------------------


async def test_the_box_streams_what_a_client_gets_as_a_chat_message_or_as_text(bench: Bench) -> None:
    _, gateway = await one_worker(bench)
    as_chat, as_text = await client_answer(gateway, chat=chat(TEXT)), await client_answer(gateway, text=TEXT)
    assert as_chat.texts != as_text.texts
    for body, expected in (
        ({}, as_chat),
        ({"chat": True}, as_chat),
        ({"chat": False}, as_text),
        ({"model": "tiny"}, as_chat),
    ):
        tried = await answer_of(gateway, **body)
        assert (tried.texts, tried.token_ids, tried.reasons) == (expected.texts, expected.token_ids, expected.reasons)
        assert len(tried.token_ids[0]) == NUM_TOKENS


async def test_a_model_without_a_chat_template_continues_the_text(bench: Bench) -> None:
    _, gateway = await one_worker(bench, chat_template=False)
    assert (await answer_of(gateway)).texts == (await client_answer(gateway, text=TEXT)).texts
    async with trying(gateway, chat=True) as response:
        assert response.status == 400
        assert (await response.json())["reason"] == "NO_CHAT_TEMPLATE"


async def test_a_tried_prompt_is_a_request_like_any_other(bench: Bench) -> None:
    _, gateway = await one_worker(bench)
    accepted = (await answer_of(gateway)).accepted
    assert accepted is not None
    record = await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=accepted.request_id))
    assert (record.request.state, record.request.num_output_tokens) == (pb.REQUEST_STATE_SUCCEEDED, NUM_TOKENS)
    assert (await gateway.stub.GetTimeline(pb.GetTimelineRequest(request_id=accepted.request_id))).timeline.ended


async def test_tokens_are_streamed_while_later_ones_are_computed(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    decode.hold("token:5")
    async with trying(gateway) as response:
        assert "accepted" in await first_line(response)
        num_tokens = 0
        while num_tokens < 5:
            num_tokens += len((await first_line(response))["delta"]["tokens"])
        decode.release("token:5")
        assert "finished" in (await lines_of(response))[-1]


async def test_an_error_in_the_middle_is_the_last_line(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    decode.hold("token:5")
    async with trying(gateway) as response:
        request_id = (await first_line(response))["accepted"]["request_id"]
        await decode.wait_for("token:5")
        await gateway.stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))
        last = (await lines_of(response))[-1]
    assert (last["reason"], last["code"]) == ("CANCELLED", "CANCELLED")
    assert last["error"]


# --- refusals -------------------------------------------------------------------------------------


WRONG_BODIES = [
    (b"", "body"),
    (b"{", "body"),
    (b"[]", "body"),
    (b"\xff", "body"),
    (b"[" * 8000, "body"),
    (b"{}", "text"),
    (b'{"text": ""}', "text"),
    (b'{"text": 7}', "text"),
    (b'{"text": "\\ud800"}', "body"),
    (b'{"text": "x", "max_tokens": 0}', "max_tokens"),
    (b'{"text": "x", "max_tokens": 257}', "max_tokens"),
    (b'{"text": "x", "max_tokens": 2.5}', "max_tokens"),
    (b'{"text": "x", "max_tokens": true}', "max_tokens"),
    (b'{"text": "x", "temprature": 1}', "temprature"),
    (json.dumps({"text": "x" * 600}).encode(), "prompt"),
]
JSON = {"Content-Type": "application/json"}


async def test_a_wrong_body_is_refused_by_field_and_costs_nothing(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    async with aiohttp.ClientSession() as session:
        for body, field in WRONG_BODIES:
            async with session.post(gateway.http_url + URL, data=body, headers=JSON) as response:
                told = await response.json()
            assert (response.status, told["reason"], told["code"]) == (400, "INVALID_REQUEST", "INVALID_ARGUMENT"), body
            assert told["error"].startswith(f"{field} "), body
    assert decode.num_jobs == 0


async def test_compressed_bodies_are_refused(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    _, gateway = await one_worker(bench)
    async with aiohttp.ClientSession() as session:
        for body in (gzip.compress(json.dumps({"text": TEXT}).encode()), b"no gzip"):
            headers = JSON | {"Content-Encoding": "gzip"}
            async with session.post(gateway.http_url + URL, data=body, headers=headers) as response:
                assert (response.status, (await response.json())["reason"]) == (400, "INVALID_REQUEST")
    await answer_of(gateway)
    assert [record for record in caplog.records if record.exc_info] == []


REFUSED_HEADERS = [
    ({"Content-Type": "text/plain"}, 415),
    ({"Origin": "http://elsewhere.example"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Host": "rebound.example"}, 403),
]


async def test_other_pages_are_refused(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    async with aiohttp.ClientSession() as session:
        for headers, status in REFUSED_HEADERS:
            data = json.dumps({"text": TEXT})
            async with session.post(gateway.http_url + URL, data=data, headers=JSON | headers) as response:
                assert response.status == status, headers
                assert "error" in await response.json()
                assert "Access-Control-Allow-Origin" not in response.headers
    assert decode.num_jobs == 0


async def test_large_and_slow_bodies_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, gateway = await one_worker(bench)
    async with trying(gateway, text="x" * try_box.MAX_BODY_BYTES) as response:
        assert response.status == 413
        assert str(try_box.MAX_BODY_BYTES) in (await response.json())["error"]
    never = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"text"'
        await never.wait()

    monkeypatch.setattr(try_box, "BODY_TIMEOUT_S", 0.01)
    async with (
        aiohttp.ClientSession() as session,
        session.post(gateway.http_url + URL, data=pieces(), headers=JSON) as response,
    ):
        assert (response.status, (await response.json())["code"]) == (504, "DEADLINE_EXCEEDED")
        never.set()


async def test_errors_of_the_protocol_have_their_http_status(bench: Bench) -> None:
    gateway = await bench.gateway(http=True, max_running_requests=1, worker_wait_ms=10)
    async with trying(gateway, chat=False) as response:
        told = await response.json()
        assert (response.status, told["reason"], told["code"]) == (404, "MODEL_NOT_FOUND", "NOT_FOUND")


async def test_an_overloaded_gateway_answers_with_retry_after(bench: Bench) -> None:
    decode, gateway = await one_worker(bench, max_running_requests=1)
    decode.hold("token:5")
    async with trying(gateway) as first:
        await first_line(first)
        async with trying(gateway) as second:
            assert (second.status, (await second.json())["reason"]) == (429, "OVERLOADED")
            assert int(second.headers["Retry-After"]) >= 1
        decode.release("token:5")
        await lines_of(first)


async def test_only_a_few_prompts_run_at_once(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    decode.hold("token:5")
    async with AsyncExitStack() as stack:
        tried = [await stack.enter_async_context(trying(gateway)) for _ in range(try_box.MAX_AT_ONCE)]
        async with trying(gateway) as one_more:
            assert (one_more.status, (await one_more.json())["reason"]) == (429, "OVERLOADED")
        assert await client_is_served(gateway, decode), "others are not held up"
        for response in tried:
            assert "finished" in (await lines_of(response))[-1]
    await answer_of(gateway)


async def client_is_served(gateway: Gateway, decode: FakeDecodeWorker) -> bool:
    reading = asyncio.create_task(client_answer(gateway, text=TEXT))
    decode.release("token:5")
    return len((await reading).token_ids[0]) == NUM_TOKENS


@pytest.mark.parametrize("step", ["prompt", "token:5"])
async def test_a_page_that_goes_away_cancels_its_request(bench: Bench, step: str) -> None:
    decode, gateway = await one_worker(bench)
    decode.hold(step)
    async with trying(gateway) as response:
        request_id = (await first_line(response))["accepted"]["request_id"]
        await decode.wait_for(step)
        response.close()
    await bench.at_rest()
    record = await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))
    assert record.request.state == pb.REQUEST_STATE_CANCELLED
    decode.release(step)
    for _ in range(try_box.MAX_AT_ONCE + 1):  # its place is free again
        await answer_of(gateway)


async def test_the_box_can_be_switched_off(bench: Bench) -> None:
    _, gateway = await one_worker(bench, try_box=False)
    async with trying(gateway) as response:
        assert (response.status, "--try-box" in (await response.json())["error"]) == (501, True)
    async with aiohttp.ClientSession() as session, session.get(gateway.http_url + "/api/overview") as overview:
        assert (await overview.json())["try_box"] is False


@pytest.mark.parametrize(("host", "is_open"), [("127.0.0.1", True), ("0.0.0.0", False), ("10.1.2.3", False)])
def test_by_default_only_users_of_this_machine_get_the_box(host: str, is_open: bool) -> None:
    server = ServerSettings(host=host)
    assert GatewaySettings(server=server).takes_typed_prompts is is_open
    for chosen in (True, False):
        settings = GatewaySettings(server=server, requests=RequestSettings(try_box=chosen))
        assert settings.takes_typed_prompts is chosen


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.skipif(find_chromium() is None, reason=left_out.CHROMIUM)
async def test_in_a_browser_answer_and_timeline_of_a_prompt_are_shown(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "<b>bold</b><img src=x onerror=alert(1)>"
    ids = fake_workers.TOKENIZER.encode(said, add_special_tokens=False).ids
    monkeypatch.setattr(fake_workers, "_token_id", lambda prompt, sequence, index: ids[index % len(ids)])
    decode, gateway = await one_worker(bench)
    async with open_page(gateway.http_url + "/", width=420, height=800) as page:
        await page.wait_for("!document.querySelector('#try').hidden")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 420
        assert "left" not in await page.text_of("#timeline")
        await page.evaluate(f"document.querySelector('#max-tokens').value = {len(ids)}")
        decode.hold("token:5")
        await page.click("#prompt")
        await page.type(TEXT)
        await page.press_enter()
        await page.wait_for(f"document.querySelector('#answer').textContent === {said[:5]!r}")
        assert await page.text_of("#send") == "Stop"
        decode.release("token:5")
        await page.wait_for("document.querySelector('#send').textContent === 'Send'")
        assert await page.text_of("#answer") == said
        assert await page.evaluate("document.querySelectorAll('#answer *').length") == 0
        assert f"{len(ids)} tokens in " in await page.text_of("#said")
        await page.wait_for(f"document.querySelector('#timeline').innerText.includes('{len(ids)}, each once')")
        shown = await page.text_of("#timeline .title code")
        sent = (await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=shown))).request
        assert (sent.state, sent.num_output_tokens) == (pb.REQUEST_STATE_SUCCEEDED, len(ids))
        assert await page.evaluate("document.documentElement.scrollWidth") <= 420


@pytest.mark.skipif(find_chromium() is None, reason=left_out.CHROMIUM)
async def test_in_a_browser_stop_cancels_and_errors_are_shown(bench: Bench) -> None:
    decode, gateway = await one_worker(bench)
    async with open_page(gateway.http_url + "/") as page:
        await page.wait_for("!document.querySelector('#try').hidden")
        decode.hold("token:5")
        await page.click("#prompt")
        await page.type(TEXT)
        await page.click("#send")
        await decode.wait_for("token:5")
        await page.wait_for("document.querySelector('#answer').textContent.length === 5")
        await page.click("#send")
        await page.wait_for("document.querySelector('#said').textContent === 'stopped'")
        await bench.at_rest()
        request_id = await page.evaluate("new URLSearchParams(location.hash.slice(1)).get('request')")
        sent = (await gateway.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request
        assert sent.state == pb.REQUEST_STATE_CANCELLED
        await page.evaluate("document.querySelector('#prompt').value = 'x'.repeat(600)")
        await page.click("#send")
        await page.wait_for("document.querySelector('#said').className === 'bad'")
        assert "the longest sequence here has 512 tokens" in await page.text_of("#said")
