"""`kvrelay trace` and `kvrelay top` as a user types them, against a scripted gateway."""

import json
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from rich.console import Console

from kvrelay.cli.views.top_view import rates_between, top_view
from kvrelay.cli.views.waterfall import Waterfall
from kvrelay.client.results import Cluster, RequestInfo, RequestState, RequestTimeline, TransferTotal
from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.timeline import JobOutcome, JobTimeline, SpanKind, Timeline, TimelineSpan, TokenRun
from kvrelay.v1 import inference_pb2
from kvrelay.wire.timeline import timeline_to_pb
from tests.cli.test_commands import Run, run, service
from tests.support.fake_inference_service import REQUEST_ID, FakeInferenceService

__all__ = ["run", "service"]

NOW = datetime(2026, 1, 2, tzinfo=UTC)
WORKER_LOST = "decode-aaaa was lost"


def survivor() -> Timeline:
    """48 tokens over two attempts."""
    first = JobTimeline(
        attempt=1,
        first_sequence=0,
        num_sequences=1,
        begin_ms=0,
        end_ms=500,
        outcome=JobOutcome.RETRIED,
        end_reason=WORKER_LOST,
        failed_worker_id="decode-aaaa",
        prefill_worker_id="prefill-cccc",
        decode_worker_id="decode-aaaa",
        spans=(
            TimelineSpan(SpanKind.ROUTE, 0, 10),
            TimelineSpan(SpanKind.PREFILL, 20, 200, "prefill-cccc"),
            TimelineSpan(SpanKind.TRANSFER, 60, 220, "prefill-cccc"),
            TimelineSpan(SpanKind.DECODE, 220, 500, "decode-aaaa", unreported=True),
        ),
        prompt_chunks=(ChunkTime(20, 100, 0, 96), ChunkTime(110, 200, 96, 200)),
        kv_chunks=(ChunkTime(60, 110, 0, 96, 0, 30, 11_000_000),),
        kv_bytes=22_000_000,
        transfer_wire_ms=100,
        token_runs=(TokenRun(0, 0, 18, 200, 450, (200, 450), 17),),
    )
    second = JobTimeline(
        attempt=2,
        first_sequence=0,
        num_sequences=1,
        begin_ms=500,
        end_ms=1000,
        outcome=JobOutcome.COMPLETED,
        decode_worker_id="decode-bbbb",
        spans=(TimelineSpan(SpanKind.DECODE, 700, 1000, "decode-bbbb"),),
        token_runs=(TokenRun(0, 18, 30, 700, 1000, (700, 1000), 29),),
    )
    return Timeline("gateway-1", NOW, 1000, True, (), (first, second))


def answer(timeline: Timeline) -> inference_pb2.GetTimelineResponse:
    request = inference_pb2.RequestInfo(
        request_id=REQUEST_ID,
        state=inference_pb2.REQUEST_STATE_SUCCEEDED,
        model="tiny",
        attempt=2,
        num_prompt_tokens=200,
        num_output_tokens=48,
    )
    return inference_pb2.GetTimelineResponse(request=request, timeline=timeline_to_pb(timeline))


def drawn(timeline: Timeline, width: int = 100) -> str:
    info = RequestInfo(REQUEST_ID, RequestState.SUCCEEDED, "tiny", "", 2, 200, 48, "g", "", "d", NOW, NOW, "")
    console = Console(width=width)
    with console.capture() as capture:
        console.print(Waterfall(RequestTimeline(info, timeline)))
    return capture.get()


async def test_trace_draws_both_attempts_of_a_request_that_survived(service: FakeInferenceService, run: Run) -> None:
    service.unary["GetTimeline"] = answer(survivor())
    result = await run("trace", REQUEST_ID)
    assert (result.exit_code, result.err) == (0, "")
    for expected in (
        "attempt 1",
        WORKER_LOST,
        "22.0 MB of KV",
        "attempt 2",
        "0-17, attempt 1",
        "18-47, attempt 2",
        "250.0 ms",
    ):
        assert expected in result.out
    assert "not contiguous" not in result.out
    assert [call.request_id for call in service.calls] == [REQUEST_ID]


async def test_trace_takes_the_newest_request_when_none_is_named(service: FakeInferenceService, run: Run) -> None:
    service.unary["ListRequests"] = inference_pb2.ListRequestsResponse(requests=[answer(survivor()).request])
    service.unary["GetTimeline"] = answer(survivor())
    assert (await run("trace")).exit_code == 0
    assert service.calls[-1].request_id == REQUEST_ID
    service.unary["ListRequests"] = inference_pb2.ListRequestsResponse()
    result = await run("trace")
    assert (result.exit_code, "no request is known yet" in result.err) == (1, True)


async def test_trace_writes_json_for_programs(service: FakeInferenceService, run: Run) -> None:
    service.unary["GetTimeline"] = answer(survivor())
    jobs = json.loads((await run("trace", REQUEST_ID, "--json")).out)["timeline"]["jobs"]
    assert [job["outcome"] for job in jobs] == ["retried", "completed"]
    runs = [run for job in jobs for run in job["token_runs"]]
    assert all(before["first_index"] + before["num_tokens"] == after["first_index"] for before, after in pairwise(runs))


@pytest.mark.parametrize("width", [20, 80, 100, 240])
def test_a_waterfall_fits_its_terminal(width: int) -> None:
    lines = drawn(survivor(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("█" in line for line in lines)


def test_a_waterfall_says_when_tokens_are_missing() -> None:
    whole = survivor()
    torn = Timeline("g", NOW, 1000, True, (7,), whole.jobs)
    assert "not contiguous" in drawn(torn)
    assert "taken over from another gateway after 7 tokens" in drawn(torn)


async def test_top_shows_workers_transfers_and_requests_once(service: FakeInferenceService, run: Run) -> None:
    load = inference_pb2.WorkerInfo().load
    load.num_running, load.num_used_blocks, load.num_cached_blocks, load.num_blocks = 2, 30, 20, 100
    worker = inference_pb2.WorkerInfo(
        worker_id="decode-bbbb", role=inference_pb2.WORKER_ROLE_DECODE, load=load, connected=True
    )
    worker.model.dtype = "float32"
    transfer = inference_pb2.TransferTotal(
        prefill_worker_id="prefill-cccc",
        decode_worker_id="decode-bbbb",
        num_transfers=3,
        kv_bytes=66_000_000,
        wire_ms=100,
    )
    running = answer(survivor()).request
    running.state = inference_pb2.REQUEST_STATE_DECODING
    service.unary["GetCluster"] = inference_pb2.GetClusterResponse(
        gateway_id="gateway-1", workers=[worker], transfers=[transfer], running_requests=[running]
    )
    service.unary["ListRequests"] = inference_pb2.ListRequestsResponse(requests=[answer(survivor()).request])
    result = await run("top", "--once")
    assert (result.exit_code, result.err) == (0, "")
    for expected in ("decode-bbbb", "prefill-cccc", "66.0", "0.66", "█" * 8 + "▒" * 5 + "·", REQUEST_ID, "decoding"):
        assert expected in result.out
    assert result.out.count(REQUEST_ID) == 1, "as it runs, and not as the store has it"


def test_rates_are_differences_and_start_anew_with_another_gateway() -> None:
    def look(gateway_id: str, num_tokens: int, kv_bytes: int) -> Cluster:
        transfers = (TransferTotal("p", "d", 1, kv_bytes, 1.0),)
        return Cluster(gateway_id, (), (), False, (), transfers, num_tokens)

    rates = rates_between((1.0, look("g", 100, 1000)), (3.0, look("g", 150, 5000)))
    assert rates is not None
    assert (rates.tokens_per_s, rates.kv_bytes_per_s) == (25.0, 2000.0)
    assert rates_between((1.0, look("g", 100, 1000)), (3.0, look("h", 150, 5000))) is None
    assert rates_between(None, (3.0, look("g", 150, 5000))) is None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(top_view(look("g", 1, 1), [], rates))
    assert "25.0 tokens/s" in capture.get()
