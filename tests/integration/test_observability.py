"""What a cluster shows of itself: metrics that are what its clients counted, one trace over all
processes, and logs that name it.

Real processes, one cluster for all of it. The last test kills a worker.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry import metrics as gateway_metrics
from kvrelay.client import Completion
from kvrelay.network.rpc import create_channel
from kvrelay.observability.metrics import vllm_names
from kvrelay.testing.fault_cluster import FaultCluster
from kvrelay.testing.waiting import wait_until
from kvrelay.v1 import inference_pb2, inference_pb2_grpc, session_pb2
from tests.integration.clusters import CALM, assert_at_rest, greedy, random_prompt, token_ids
from tests.support.metrics_lint import problems
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan, receiving
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

LOCAL_TOKENS = 24
PROMPT_LENGTHS = (8, 40, 70, 130)
NUM_TOKENS = 12
MODEL = "llama"
SERVICES = {"kvrelay-gateway", "kvrelay-prefill", "kvrelay-decode"}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"

Value = Callable[..., float]


@dataclass(slots=True)
class Observed:
    """The cluster, with all that it says."""

    faults: FaultCluster
    collector: OtlpReceiver
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Of each process's log."""

    def take_line(self, name: str, line: str) -> None:
        if line.startswith("{"):
            self.lines.setdefault(name, []).append(json.loads(line))

    @property
    def http_addresses(self) -> dict[str, str]:
        """Of each process, by its name: where its log said that it listens."""
        ready = {name: line for name, lines in self.lines.items() for line in lines if line["event"] == "ready"}
        return {name: f"127.0.0.1:{line['http_port']}" for name, line in ready.items()}

    def lines_about(self, request_id: str) -> dict[str, list[dict[str, Any]]]:
        """Lines that name the request, by process."""
        about = {name: [line for line in lines if request_id in json.dumps(line)] for name, lines in self.lines.items()}
        return {name: lines for name, lines in about.items() if lines}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Observed]:
    model: Path = make_tiny_model("llama", tmp_path_factory.mktemp("models"))
    async with receiving() as collector:
        server = {
            **CALM,
            "http_port": 0,
            "vllm_metrics": True,
            "log_format": "json",
            "log_level": "debug",
            "otlp_endpoint": collector.endpoint,
        }
        faults = FaultCluster(
            num_decode=2,
            model=model,
            server=server,
            requests={"local_prefill_tokens": LOCAL_TOKENS},
            engine={"served_model_name": MODEL, "block_size": 16},
        )
        observed = Observed(faults, collector)
        faults.on_line = observed.take_line
        async with faults:
            yield observed


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def completions(cluster: Observed) -> list[Completion]:
    """Requests of several lengths, one of two sequences, and what clients got."""
    async with cluster.faults.client() as client:
        prompts = [random_prompt(seed, length) for seed, length in enumerate(PROMPT_LENGTHS)]
        done = await asyncio.gather(*(greedy(client, prompt, NUM_TOKENS) for prompt in prompts))
        two = await greedy(client, random_prompt(9, 50), NUM_TOKENS, n=2, temperature=1.0, seed=5)
        await assert_at_rest(client)
    return [*done, two]


async def scrape(cluster: Observed, accept: str = "text/plain") -> dict[str, str]:
    """Each process's page."""
    pages = {}
    for name in cluster.http_addresses:
        pages[name] = await scrape_one(cluster, name, accept)
    assert len(pages) == 4
    return pages


async def scrape_one(cluster: Observed, name: str, accept: str = "text/plain") -> str:
    """A process's page."""
    url = f"http://{cluster.http_addresses[name]}/metrics"
    async with aiohttp.ClientSession(headers={"Accept": accept}) as session, session.get(url) as response:
        assert response.status == 200
        return await response.text()


def reader(pages: Mapping[str, str], role: str) -> Value:
    """Sums a sample over the processes of a role, over all of its series that have the given
    labels.
    """
    families = [
        family
        for name, page in pages.items()
        if name.startswith(role)
        for family in text_string_to_metric_families(page)
    ]

    def value(name: str, **labels: str) -> float:
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"{role} has no {name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    return value


async def test_metrics_are_what_clients_counted(cluster: Observed, completions: list[Completion]) -> None:
    pages = await scrape(cluster)
    gateway, prefill, decode = reader(pages, "gateway"), reader(pages, "prefill"), reader(pages, "decode")
    finished = [completion.finished for completion in completions]
    num_tokens = sum(len(token_ids(each, number)) for each in completions for number in range(len(each.outputs)))
    num_prompt_tokens = sum(each.usage.num_prompt_tokens for each in finished)
    transfer_bytes = sum(each.phases.transfer_bytes for each in finished)
    pushed = [each for each in finished if each.phases.transfer_bytes]
    assert len(pushed) == len(PROMPT_LENGTHS)  # all but one, and the one of two sequences

    assert gateway("kvrelay_requests_started_total") == len(completions)
    assert gateway("kvrelay_requests_total", outcome="succeeded", model=MODEL) == len(completions)
    assert gateway("kvrelay_requests_total") == len(completions)
    assert gateway("kvrelay_attempts_total") == gateway("kvrelay_attempts_total", cause="first") == len(completions)
    assert gateway("kvrelay_requests_running") == gateway("kvrelay_requests_waiting") == 0
    assert gateway("kvrelay_workers", role="decode") == 2
    assert gateway("kvrelay_output_tokens_total") == num_tokens == NUM_TOKENS * (len(completions) + 1)
    assert gateway("kvrelay_prompt_tokens_total") == num_prompt_tokens
    assert gateway("kvrelay_sequences_finished_total", reason="length") == len(completions) + 1
    assert gateway("kvrelay_time_to_first_token_seconds_count") == len(completions)
    assert gateway("kvrelay_inter_token_latency_seconds_count") == num_tokens - (len(completions) + 1)
    assert gateway("kvrelay_request_output_tokens_sum") == num_tokens
    shown_ms = sum(each.phases.time_to_first_token_ms for each in finished)
    assert gateway("kvrelay_time_to_first_token_seconds_sum") == pytest.approx(shown_ms / 1000, rel=0.05, abs=0.01)

    assert (
        prefill("kvrelay_transfer_bytes_total") == decode("kvrelay_decode_received_bytes_total") == transfer_bytes > 0
    )
    assert prefill("kvrelay_transfers_total") == decode("kvrelay_decode_starts_total", source="push") == len(pushed)
    exposed_ms = sum(each.phases.exposed_transfer_ms for each in pushed)
    assert prefill("kvrelay_transfer_exposed_seconds_sum") == pytest.approx(exposed_ms / 1000, rel=1e-3)
    wire_ms = sum(each.phases.transfer_wire_ms for each in pushed)
    assert prefill("kvrelay_transfer_wire_seconds_total") == pytest.approx(wire_ms / 1000, rel=1e-3)
    assert prefill("kvrelay_transfer_throughput_bytes_per_second_count") == len(pushed)
    assert prefill("kvrelay_prefill_first_tokens_total") + decode("kvrelay_decode_tokens_total") == num_tokens
    num_cached = sum(each.usage.num_cached_tokens for each in finished)
    num_computed = prefill("kvrelay_worker_prompt_tokens_total") + decode("kvrelay_worker_prompt_tokens_total")
    assert num_computed + prefill("kvrelay_worker_prefix_hit_tokens_total") + num_cached == num_prompt_tokens
    assert decode("kvrelay_worker_kv_blocks", state="used") == 0
    assert decode("kvrelay_worker_engine_busy_seconds_total") > 0


async def test_metrics_have_vllms_names_too(cluster: Observed, completions: list[Completion]) -> None:
    pages = await scrape(cluster)
    gateway, decode = reader(pages, "gateway"), reader(pages, "decode")
    assert gateway("vllm:generation_tokens_total", model_name=MODEL, engine="0") == gateway(
        "kvrelay_output_tokens_total"
    )
    assert gateway("vllm:request_success_total", finished_reason="length") == len(completions) + 1
    assert gateway("vllm:time_to_first_token_seconds_count") == len(completions)
    assert (
        decode("vllm:num_requests_waiting")
        == decode("vllm:kv_cache_usage_perc")
        == decode("vllm:num_requests_running")
        == 0
    )
    assert decode("vllm:cache_config_info", block_size="16") == 2
    shown = {family.name for page in pages.values() for family in text_string_to_metric_families(page)}
    declared = {family.name.removesuffix("_total") for family in vllm_names.FAMILIES}
    assert {name for name in shown if name.startswith("vllm:")} == declared


async def test_metrics_are_named_and_typed_as_prometheus_wants_them(
    cluster: Observed, completions: list[Completion]
) -> None:
    for name, page in (await scrape(cluster)).items():
        assert problems(page, "kvrelay_") == [], name
        assert [
            each for each in problems(page, "vllm:") if "is told" in each or "help" in each or "twice" in each
        ] == []
        assert "process_resident_memory_bytes" in page
    openmetrics = await scrape(cluster, "application/openmetrics-text; version=1.0.0")
    assert all(page.endswith("# EOF\n") for page in openmetrics.values())


async def test_every_family_of_the_gateway_is_shown(cluster: Observed, completions: list[Completion]) -> None:
    page = (await scrape(cluster))["gateway"]
    assert [family.name for family in gateway_metrics.FAMILIES if f"# TYPE {family.name} " not in page] == []


# --- traces and logs ------------------------------------------------------------------------------


async def generate(
    cluster: Observed, prompt: list[int], num_tokens: int, traceparent: str | None, tenant: str = ""
) -> tuple[str, list[int]]:
    """A greedy request by a client that speaks gRPC and nothing of ours; its id and its tokens."""
    sampling = session_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    message = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling, tenant=tenant
    )
    metadata = () if traceparent is None else (("traceparent", traceparent),)
    request_id = ""
    tokens: list[int] = []
    async with create_channel(cluster.faults.addresses[0]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        async for response in stub.Generate(message, metadata=metadata, timeout=120):
            if response.HasField("accepted"):
                request_id = response.accepted.request_id
            tokens.extend(token.token_id for token in response.delta.tokens)
    return request_id, tokens


async def spans_of(cluster: Observed, trace_id: str, names: set[str]) -> dict[str, list[ReceivedSpan]]:
    """The trace's spans by name, once these names are there, of all services: each exports its own
    in its time.
    """

    def arrived() -> bool:
        spans = cluster.collector.of_trace(trace_id)
        return names <= {span.name for span in spans} and {span.service for span in spans} == SERVICES

    await wait_until(arrived, f"spans {names} of {SERVICES} arrive")
    spans: dict[str, list[ReceivedSpan]] = {}
    for span in cluster.collector.of_trace(trace_id):
        spans.setdefault(span.name, []).append(span)
    return spans


WHOLE = {"generate", "attempt", "queue", "reserve", "prefill.queue", "prefill", "kv.send", "kv.receive", "decode"}


async def test_a_trace_of_the_client_goes_through_all_processes(
    cluster: Observed, completions: list[Completion]
) -> None:
    request_id, tokens = await generate(cluster, random_prompt(20, 60), NUM_TOKENS, f"00-{TRACE_ID}-{PARENT_ID}-01")
    assert len(tokens) == NUM_TOKENS
    spans = await spans_of(cluster, TRACE_ID, WHOLE)
    assert {name: len(found) for name, found in spans.items()} == dict.fromkeys(WHOLE, 1)
    (root,), (attempt,) = spans["generate"], spans["attempt"]
    assert {span.service for found in spans.values() for span in found} == SERVICES
    assert {span.attributes["kvrelay.request_id"] for found in spans.values() for span in found} == {request_id}
    assert (root.parent_id, attempt.parent_id) == (PARENT_ID, root.span_id)
    assert root.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    for name in WHOLE - {"generate", "attempt", "kv.receive"}:
        assert spans[name][0].parent_id == attempt.span_id, name
    (sent,), (received,) = spans["kv.send"], spans["kv.receive"]
    assert received.parent_id == sent.span_id
    assert sent.attributes["kvrelay.kv_bytes"] == received.attributes["kvrelay.kv_bytes"]
    assert int(sent.attributes["kvrelay.kv_bytes"]) > 0
    assert (sent.service, received.service) == ("kvrelay-prefill", "kvrelay-decode")
    assert all(span.error is None and span.began_ns <= span.ended_ns for found in spans.values() for span in found)


async def test_a_request_without_a_trace_begins_one_that_has_its_id(
    cluster: Observed, completions: list[Completion]
) -> None:
    request_id, _ = await generate(cluster, random_prompt(21, 60), NUM_TOKENS, None)
    spans = await spans_of(cluster, request_id, WHOLE)
    assert spans["generate"][0].parent_id == ""


async def test_a_client_may_want_no_spans(cluster: Observed, completions: list[Completion]) -> None:
    unsampled = TRACE_ID[::-1]
    await generate(cluster, random_prompt(22, 60), NUM_TOKENS, f"00-{unsampled}-{PARENT_ID}-00")
    later, _ = await generate(cluster, random_prompt(23, 60), NUM_TOKENS, None)
    await spans_of(cluster, later, WHOLE)
    assert cluster.collector.of_trace(unsampled) == []


async def test_lines_about_a_request_name_it_its_attempt_and_its_trace(
    cluster: Observed, completions: list[Completion]
) -> None:
    trace_id = TRACE_ID.replace("0af7", "0bf7")
    request_id, _ = await generate(cluster, random_prompt(24, 60), NUM_TOKENS, f"00-{trace_id}-{PARENT_ID}-01")
    await wait_until(lambda: len(cluster.lines_about(request_id)) == 3, "three processes log about the request")
    for name, lines in cluster.lines_about(request_id).items():
        for line in lines:
            assert {"request_id": request_id, "attempt": 1, "trace_id": trace_id}.items() <= line.items(), (name, line)


async def test_an_attempt_after_a_death_is_part_of_the_same_trace(
    cluster: Observed, completions: list[Completion]
) -> None:
    trace_id = TRACE_ID.replace("0af7", "0cf7")
    prompt = random_prompt(25, 60)
    # Another tenant: cached blocks would leave nothing for the prefill worker.
    _, undisturbed = await generate(cluster, prompt, NUM_TOKENS, None, tenant="undisturbed")
    fault = cluster.faults.arm_one_of("decode", "decode.step_computed", at=5)
    request_id, tokens = await generate(cluster, prompt, NUM_TOKENS, f"00-{trace_id}-{PARENT_ID}-01")
    assert (tokens, fault.num_fired) == (undisturbed, 1)
    spans = await spans_of(cluster, trace_id, {"generate", "attempt", "prefill", "decode"})
    first, second = spans["attempt"]
    assert [attempt.attributes["kvrelay.attempt"] for attempt in (first, second)] == [1, 2]
    assert (first.error, second.error, spans["generate"][0].error) == ("worker_lost", None, None)
    assert first.parent_id == second.parent_id == spans["generate"][0].span_id
    # the dead worker's was never told
    assert [span.parent_id for span in spans["decode"]] == [second.span_id]
    assert {span.service for found in spans.values() for span in found} == SERVICES
    value = reader({"gateway": await scrape_one(cluster, "gateway")}, "gateway")
    assert value("kvrelay_attempts_total", cause="worker_lost") == 1
    assert value("kvrelay_session_losses_total", role="decode", cause="broken") == 1
    retried = [line for line in cluster.lines["gateway"] if line["event"] == "request is attempted again"]
    assert [(line["request_id"], line["attempt"], line["trace_id"]) for line in retried] == [(request_id, 2, trace_id)]
