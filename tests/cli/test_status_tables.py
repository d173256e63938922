"""Tables of a cluster: what they show only where there is something to show."""

from rich.console import Console

from kvrelay.cli.status_tables import cluster_view
from kvrelay.client.results import Cluster, WorkerInfo, WorkerRole
from kvrelay.model_spec import KVLayout, ModelSpec
from kvrelay.work import WorkerLoad

MODEL = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), 50, 64, (0,), "f")


def shown(*loads: WorkerLoad) -> str:
    workers = tuple(
        WorkerInfo(f"worker-{number}", WorkerRole.DECODE, "127.0.0.1:1", MODEL, load, True, 0.0, 16)
        for number, load in enumerate(loads)
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(cluster_view(Cluster("g", (), workers, degraded=False, running_requests=())))
    return capture.get()


def test_the_share_of_right_guesses_is_shown_where_workers_guess() -> None:
    text = shown(WorkerLoad(num_drafted_tokens=40, num_accepted_tokens=30), WorkerLoad())
    assert "guesses right" in text
    assert "75 % of 40" in text
    assert "guesses right" not in shown(WorkerLoad())
