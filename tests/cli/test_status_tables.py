"""Tables of a cluster: what they show only where there is something to show."""

from collections.abc import Callable

import pytest
from rich.console import Console, RenderableType

from kvrelay.cli.views.status_tables import cluster_view
from kvrelay.cli.views.top_view import top_view
from kvrelay.client.results import Cluster, WorkerInfo, WorkerRole, cluster_from_pb
from kvrelay.core.job import WorkerLoad
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.v1 import inference_pb2, session_pb2

MODEL = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 50, 64, (0,), "f")


def printed(view: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def shown(*loads: WorkerLoad) -> str:
    workers = tuple(
        WorkerInfo(f"worker-{number}", WorkerRole.DECODE, "127.0.0.1:1", MODEL, load, True, 0.0, 16)
        for number, load in enumerate(loads)
    )
    return printed(cluster_view(Cluster("g", (), workers, degraded=False, running_requests=())))


def test_the_share_of_right_guesses_is_shown_where_workers_guess() -> None:
    text = shown(WorkerLoad(num_drafted_tokens=40, num_accepted_tokens=30), WorkerLoad())
    assert "guesses right" in text
    assert "75 % of 40" in text
    assert "guesses right" not in shown(WorkerLoad())


def test_rates_of_prompts_are_shown_once_they_are_measured() -> None:
    text = shown(WorkerLoad(prefill_tokens_per_s=12345.6), WorkerLoad())
    assert "prompt tokens/s" in text
    assert "12,346" in text
    assert "prompt tokens/s" not in shown(WorkerLoad())


def test_the_share_of_prompts_that_was_cached_is_shown_once_there_were_prompts() -> None:
    hits = [
        inference_pb2.CacheHits(
            role=inference_pb2.WORKER_ROLE_DECODE, num_prompt_tokens=200, num_expected_tokens=150, num_found_tokens=100
        ),
        inference_pb2.CacheHits(role=inference_pb2.WORKER_ROLE_PREFILL),
    ]
    routing = inference_pb2.RoutingInfo(strategy="prefix", cache_hits=hits)
    text = printed(cluster_view(cluster_from_pb(inference_pb2.GetClusterResponse(gateway_id="g", routing=routing))))
    assert "routing by prefix: decode workers had 50 % of prompt tokens cached (75 % expected)\n" in text
    assert "routing by" not in shown(WorkerLoad())


def test_what_workers_compute_with_is_said_once_for_all_with_the_same() -> None:
    engines = ["amx kernels", "avx2 kernels; not amx: the processor lacks amx_tile", "amx kernels", ""]
    workers = [
        inference_pb2.WorkerInfo(
            worker_id=f"w{number}", model=session_pb2.ModelInfo(dtype="float32"), connected=True, engine=engine
        )
        for number, engine in enumerate(engines)
    ]
    cluster = cluster_from_pb(inference_pb2.GetClusterResponse(gateway_id="g", workers=workers))
    lines = [line.rstrip() for line in printed(cluster_view(cluster)).splitlines()]
    assert "amx kernels (w0, w2)" in lines
    assert "avx2 kernels; not amx: the processor lacks amx_tile (w1)" in lines


@pytest.mark.parametrize("view", [cluster_view, lambda cluster: top_view(cluster, (), None)], ids=["status", "top"])
def test_a_worker_that_is_not_connected_has_a_line_that_says_why(view: Callable[[Cluster], RenderableType]) -> None:
    # brackets are no markup
    problem = "no session with [fd00::7]:1: UNAVAILABLE: connection refused"
    away = inference_pb2.WorkerInfo(worker_id="decode-away", role=inference_pb2.WORKER_ROLE_DECODE, problem=problem)
    up = inference_pb2.WorkerInfo(worker_id="decode-up", role=inference_pb2.WORKER_ROLE_DECODE, connected=True)
    for worker in (away, up):
        worker.model.dtype = "float32"
    cluster = cluster_from_pb(inference_pb2.GetClusterResponse(gateway_id="g", workers=[away, up]))
    assert [worker.problem for worker in cluster.workers] == [problem, ""]
    lines = [line.rstrip() for line in printed(view(cluster)).splitlines()]
    assert f"decode-away: {problem}" in lines
    assert not [line for line in lines if line.startswith("decode-up:")]
