"""The live page and its data, over fake workers and real gateways; in a browser if there is one."""

import asyncio
import json
import re
from dataclasses import replace
from importlib import resources
from typing import Any

import aiohttp
import grpc
import pytest

from gateway.page.live_page import MAX_REQUESTS, PAGE_FILE, Page
from kvrelay.core.job import FailureKind
from kvrelay.core.timeline import JobOutcome, Timeline
from kvrelay.errors import RequestNotFoundError
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.wire.errors import error_of_rpc
from kvrelay.wire.timeline import timeline_from_pb
from tests.gateway.conftest import Answer, Bench, Gateway, eventually, read_all, read_into, token_request
from tests.support import left_out
from tests.support.fake_workers import KV_BYTES, MODEL, FakeDecodeWorker, FakePrefillWorker
from tools.headless_chromium import dump_dom, find_chromium

PROMPT = list(range(10, 50))
NUM_TOKENS = 12
HOSTILE_NAME = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


async def two_workers(bench: Bench, **model: Any) -> tuple[FakePrefillWorker, FakeDecodeWorker]:
    served = replace(MODEL, **model)
    prefill, decode = await bench.workers.add_prefill(served), await bench.workers.add_decode(served)
    await bench.announce(prefill, decode)
    return prefill, decode


async def get(gateway: Gateway, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(gateway.http_url + path) as response:
        return response.status, json.loads(await response.text())


async def run_request(gateway: Gateway, **fields: Any) -> str:
    """Returns the id of an ended request."""
    answer = await read_all(gateway.stub.Generate(token_request(PROMPT, NUM_TOKENS, **fields)))
    assert answer.accepted is not None
    return answer.accepted.request_id


async def timeline_of(gateway: Gateway, request_id: str) -> Timeline:
    return timeline_from_pb((await gateway.stub.GetTimeline(pb.GetTimelineRequest(request_id=request_id))).timeline)


def elements(dom: str, kind: str) -> int:
    """Number of the page's elements of a class."""
    return len(re.findall(rf'class="(?:[^"]* )?{kind}(?: [^"]*)?"', dom))


# --- data -----------------------------------------------------------------------------------------


async def test_the_overview_shows_cluster_transfers_and_last_requests(bench: Bench) -> None:
    prefill, decode = await two_workers(bench)
    gateway = await bench.gateway(http=True)
    request_id = await run_request(gateway)
    status, overview = await get(gateway, "/api/overview")
    assert status == 200
    cluster = overview["cluster"]
    assert {worker["worker_id"]: worker["connected"] for worker in cluster["workers"]} == {
        prefill.worker_id: True,
        decode.worker_id: True,
    }
    (total,) = cluster["transfers"]
    assert (total["prefill_worker_id"], total["decode_worker_id"]) == (prefill.worker_id, decode.worker_id)
    assert (total["num_transfers"], total["kv_bytes"]) == ("1", str(KV_BYTES))
    assert cluster["num_output_tokens"] == str(NUM_TOKENS)
    assert [(request["request_id"], request["state"]) for request in overview["requests"]] == [
        (request_id, "REQUEST_STATE_SUCCEEDED")
    ]
    assert not {'"token_ids"', '"text"', '"tokens"'} & set(re.findall(r'"\w+"', json.dumps(overview))), (
        "what prompts and answers say is nobody's business"
    )


async def test_all_viewers_share_one_overview(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway(http=True)
    answers = await asyncio.gather(*(get(gateway, "/api/overview") for _ in range(30)))
    assert len({overview["time_ms"] for _, overview in answers}) < 30


async def test_a_timeline_is_the_same_over_http_and_grpc(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway(http=True)
    request_id = await run_request(gateway)
    status, answer = await get(gateway, f"/api/timelines/{request_id}")
    assert status == 200
    assert answer["request"]["request_id"] == request_id
    told = await timeline_of(gateway, request_id)
    (job,), (shown,) = told.jobs, answer["timeline"]["jobs"]
    assert shown["outcome"] == "JOB_OUTCOME_COMPLETED"
    assert [span["kind"] for span in shown["spans"]] == [f"SPAN_KIND_{span.kind.name}" for span in job.spans]
    assert shown["token_runs"][0]["num_tokens"] == NUM_TOKENS
    assert told.is_contiguous(0)
    assert told.phases is not None


async def test_an_unknown_request_is_not_found(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway(http=True)
    status, answer = await get(gateway, "/api/timelines/nobody%3Cb%3E")
    assert status == 404
    assert "nobody<b>" in answer["error"]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await timeline_of(gateway, "nobody")
    assert isinstance(error_of_rpc(failure.value), RequestNotFoundError)


async def test_the_last_timelines_are_kept_and_older_ones_are_not_found(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway(http=True, timeline_requests=2)
    first, *others = [await run_request(gateway) for _ in range(3)]
    status, answer = await get(gateway, f"/api/timelines/{first}")
    assert (status, "no longer kept" in answer["error"]) == (404, True)
    assert [(await get(gateway, f"/api/timelines/{other}"))[0] for other in others] == [200, 200]


async def test_a_running_request_is_shown_up_to_now(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway = await bench.gateway(http=True)
    decode.hold("token:5")
    call, answer = gateway.stub.Generate(token_request(PROMPT, NUM_TOKENS)), Answer()
    await read_into(answer, call, until=5)
    assert answer.accepted is not None
    told = await timeline_of(gateway, answer.accepted.request_id)
    assert (told.ended, told.jobs[0].outcome, told.token_runs(0)[0].num_tokens) == (False, JobOutcome.RUNNING, 5)
    later = await timeline_of(gateway, answer.accepted.request_id)
    assert later.duration_ms > told.duration_ms
    decode.release("token:5")
    await read_into(answer, call)


async def test_every_gateway_shows_the_requests_of_all_gateways(bench: Bench) -> None:
    await two_workers(bench)
    gateway, other = await bench.gateway(http=True), await bench.gateway(http=True)
    request_id = await run_request(gateway)

    async def is_listed() -> bool:
        _, overview = await get(other, "/api/overview")
        return request_id in [request["request_id"] for request in overview["requests"]]

    await eventually(is_listed, timeout_s=30)
    status, answer = await get(other, f"/api/timelines/{request_id}")
    assert status == 200
    assert answer["timeline"]["gateway_id"] == answer["request"]["gateway_id"]
    assert len((await get(other, "/api/overview"))[1]["requests"]) <= MAX_REQUESTS


async def test_a_taken_over_request_shows_what_its_new_gateway_knows(bench: Bench) -> None:
    _, decode = await two_workers(bench)
    gateway, other = await bench.gateway(), await bench.gateway()
    decode.hold("token:5")
    answer = Answer()
    await read_into(answer, gateway.stub.Generate(token_request(PROMPT, NUM_TOKENS, resumable=True)), until=5)
    assert answer.accepted is not None
    request_id = answer.accepted.request_id

    async def is_logged() -> bool:
        record = await other.stub.GetRequest(pb.GetRequestRequest(request_id=request_id))
        return record.request.num_output_tokens == 5

    await eventually(is_logged, timeout_s=30)
    await gateway.stop_at_once()
    decode.release("token:5")
    call = other.stub.Resume(pb.ResumeRequest(request_id=request_id))
    resumed = Answer()
    await read_into(resumed, call)
    assert len(resumed.token_ids[0]) == NUM_TOKENS
    told = await timeline_of(other, request_id)
    assert told.num_tokens_before[0] + sum(run.num_tokens for run in told.token_runs(0)) == NUM_TOKENS
    assert told.num_tokens_before[0] > 0
    assert told.is_contiguous(0)
    assert told.jobs[0].attempt > 1


# --- the page -------------------------------------------------------------------------------------


async def test_the_pages_policy_allows_only_its_own_script_and_style(bench: Bench) -> None:
    gateway = await bench.gateway(http=True)
    async with aiohttp.ClientSession() as session, session.get(gateway.http_url + "/") as response:
        text, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert (response.status, response.content_type) == (200, "text/html")
    assert text == resources.files("gateway.page").joinpath(PAGE_FILE).read_text("utf-8")
    assert policy == Page().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2


def test_the_page_is_one_file_that_loads_nothing_and_renders_no_text_as_html() -> None:
    text = Page().text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text) == []
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", text) == []
    assert " style=" not in text, "the policy would leave it out"
    assert len(text) < 60_000


@pytest.mark.skipif(find_chromium() is None, reason=left_out.CHROMIUM)
async def test_in_a_browser_the_page_draws_the_cluster_and_escapes_names(bench: Bench) -> None:
    _, decode = await two_workers(bench, name=HOSTILE_NAME)
    gateway = await bench.gateway(http=True)
    decode.fail_at("token:5", FailureKind.INTERNAL)
    request_id = await run_request(gateway, tenant="<i>tenant</i>")
    dom = await dump_dom(f"{gateway.http_url}/#request={request_id}")
    assert "<title>kvrelay</title>" in dom
    assert "&lt;img src=x" in dom, "the model's name is shown"
    assert "<img" not in dom
    assert elements(dom, "node") == 3
    assert elements(dom, "token") == NUM_TOKENS
    assert f"{NUM_TOKENS}, each once" in dom
    assert "attempt 2" in dom
    assert "failed by a defect: as scripted" in dom


@pytest.mark.skipif(find_chromium() is None, reason=left_out.CHROMIUM)
async def test_in_a_narrow_window_the_cluster_is_drawn_in_one_column(bench: Bench) -> None:
    await two_workers(bench)
    gateway = await bench.gateway(http=True)
    await run_request(gateway)
    dom = await dump_dom(gateway.http_url, width=500)
    places = re.findall(r'<g transform="translate\((\d+) (\d+)\)"><rect class="node', dom)
    assert [x for x, _ in places] == ["0", "0", "0"]
    assert len({y for _, y in places}) == 3
    assert re.search(r">KV prefill-\S+ → decode-\S+: ", dom)
    (width,) = re.findall(
        r'viewBox="0 0 (\d+) \d+"[^>]*aria-label="Gateways|aria-label="Gateways[^>]*viewBox="0 0 (\d+)', dom
    )[0:1]
    assert 0 < int("".join(width)) <= 500, "nothing is scaled down"
