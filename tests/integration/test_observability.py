"""What a cluster shows of itself: its metrics are what its clients counted. Real processes, one cluster for all of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from gateway import metrics as gateway_metrics
from kvrelay.client import AsyncClient, Completion
from kvrelay.config import DecodeSettings, GatewaySettings, PrefillSettings, RelaySettings, ServerSettings
from kvrelay.local_cluster import LocalCluster
from kvrelay.metrics import vllm_names
from tests.integration.clusters import assert_at_rest, engine, greedy, random_prompt, token_ids
from tests.metrics_lint import problems
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

LOCAL_TOKENS = 24
PROMPT_LENGTHS = (8, 40, 70, 130)
NUM_TOKENS = 12
MODEL = "llama"

Value = Callable[..., float]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    model: Path = make_tiny_model("llama", tmp_path_factory.mktemp("models"))
    server = ServerSettings(http_port=0, vllm_metrics=True, log_format="json")
    settings = engine(model, served_model_name=MODEL, step_timeout_ms=60000)
    async with LocalCluster(
        gateway=GatewaySettings(server=server, relay=RelaySettings(local_prefill_tokens=LOCAL_TOKENS)),
        prefill=[PrefillSettings(server=server, engine=settings)],
        decode=[DecodeSettings(server=server, engine=settings)] * 2,
        startup_timeout_s=240,
    ) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def completions(cluster: LocalCluster) -> list[Completion]:
    """Requests of several lengths, one of two sequences, and what clients got."""
    async with AsyncClient(cluster.gateway_address) as client:
        prompts = [random_prompt(seed, length) for seed, length in enumerate(PROMPT_LENGTHS)]
        done = await asyncio.gather(*(greedy(client, prompt, NUM_TOKENS) for prompt in prompts))
        two = await greedy(client, random_prompt(9, 50), NUM_TOKENS, n=2, temperature=1.0, seed=5)
        await assert_at_rest(client)
    return [*done, two]


async def scrape(cluster: LocalCluster, accept: str = "text/plain") -> dict[str, str]:
    """Each process's page."""
    pages = {}
    async with aiohttp.ClientSession(headers={"Accept": accept}) as session:
        for name, address in cluster.http_addresses.items():
            async with session.get(f"http://{address}/metrics") as response:
                assert response.status == 200
                pages[name] = await response.text()
    return pages


def reader(pages: Mapping[str, str], role: str) -> Value:
    """Sums a sample over the processes of a role, over all of its series that have the given labels."""
    families = [
        family for name, page in pages.items() if name.startswith(role) for family in text_string_to_metric_families(page)
    ]

    def value(name: str, **labels: str) -> float:
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"{role} has no {name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    return value


async def test_metrics_are_what_clients_counted(cluster: LocalCluster, completions: list[Completion]) -> None:
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

    assert prefill("kvrelay_transfer_bytes_total") == decode("kvrelay_decode_received_bytes_total") == transfer_bytes > 0
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


async def test_metrics_have_vllms_names_too(cluster: LocalCluster, completions: list[Completion]) -> None:
    pages = await scrape(cluster)
    gateway, decode = reader(pages, "gateway"), reader(pages, "decode")
    assert gateway("vllm:generation_tokens_total", model_name=MODEL, engine="0") == gateway("kvrelay_output_tokens_total")
    assert gateway("vllm:request_success_total", finished_reason="length") == len(completions) + 1
    assert gateway("vllm:time_to_first_token_seconds_count") == len(completions)
    assert decode("vllm:num_requests_waiting") == decode("vllm:kv_cache_usage_perc") == decode("vllm:num_requests_running") == 0
    assert decode("vllm:cache_config_info", block_size="16") == 2
    shown = {family.name for page in pages.values() for family in text_string_to_metric_families(page)}
    declared = {family.name.removesuffix("_total") for family in vllm_names.FAMILIES}
    assert {name for name in shown if name.startswith("vllm:")} == declared


async def test_metrics_are_named_and_typed_as_prometheus_wants_them(cluster: LocalCluster, completions: list[Completion]) -> None:
    for name, page in (await scrape(cluster)).items():
        assert problems(page, "kvrelay_") == [], name
        assert [each for each in problems(page, "vllm:") if "is told" in each or "help" in each or "twice" in each] == []
        assert "process_resident_memory_bytes" in page
    openmetrics = await scrape(cluster, "application/openmetrics-text; version=1.0.0")
    assert all(page.endswith("# EOF\n") for page in openmetrics.values())


async def test_every_family_of_the_gateway_is_shown(cluster: LocalCluster, completions: list[Completion]) -> None:
    page = (await scrape(cluster))["gateway"]
    missing = {family.name for family in gateway_metrics.FAMILIES if f"# TYPE {family.name} " not in page}
    # These have series only once there is something to count.
    assert missing == {"kvrelay_request_failures_total", "kvrelay_requests_refused_total"}
