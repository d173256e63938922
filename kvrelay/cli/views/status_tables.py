"""The cluster and its requests as tables."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.text import Text

from kvrelay.cli.views.fitted_table import FittedTable
from kvrelay.client.results import Cluster, RequestInfo, WorkerInfo
from kvrelay.core.job import WorkerLoad

_NUM_ID_CHARACTERS = 16


def cluster_view(cluster: Cluster) -> RenderableType:
    """Workers, gateways and running requests, a table each."""
    parts: list[RenderableType] = []
    if cluster.degraded:
        parts.append(Text(degraded_line(cluster), style="yellow"))
    parts += [_worker_table(cluster.workers), *problem_lines(cluster), *engine_lines(cluster), _gateway_table(cluster)]
    parts += routing_lines(cluster)
    if cluster.running_requests:
        parts.append(request_table("Running requests", cluster.running_requests))
    return Group(*parts)


def degraded_line(cluster: Cluster) -> str:
    return f"degraded: {cluster.problem or 'Redis does not answer'}; request state is not kept meanwhile"


def problem_lines(cluster: Cluster) -> list[Text]:
    """Why known workers are not connected."""
    return [
        Text(f"{_short(worker.worker_id)}: {worker.problem}", style="red")
        for worker in cluster.workers
        if worker.problem
    ]


def engine_lines(cluster: Cluster) -> list[Text]:
    """What the workers compute with; one line for all with the same."""
    ids: dict[str, list[str]] = {}
    for worker in cluster.workers:
        if worker.engine:
            ids.setdefault(worker.engine, []).append(_short(worker.worker_id))
    return [Text(f"{engine} ({', '.join(workers)})", style="dim") for engine, workers in ids.items()]


def routing_lines(cluster: Cluster) -> list[Text]:
    """What routing found in prefix caches, and what it expected."""
    shares = [
        f"{hits.role.value} workers had {_percent(hits.num_found_tokens, hits.num_prompt_tokens)} of prompt tokens cached"
        f" ({_percent(hits.num_expected_tokens, hits.num_prompt_tokens)} expected)"
        for hits in cluster.cache_hits
        if hits.num_prompt_tokens
    ]
    return [Text(f"routing by {cluster.routing}: {', '.join(shares)}", style="dim")] if shares else []


def request_table(title: str, requests: Sequence[RequestInfo]) -> FittedTable:
    table = _table(
        title, "request", "state", "model", ">attempt", ">prompt", ">output", "prefill", "decode", ">age", "error"
    )
    for request in requests:
        table.add_texts(
            request.request_id,
            request.state.value,
            request.model,
            str(request.attempt),
            str(request.num_prompt_tokens),
            str(request.num_output_tokens),
            _short(request.prefill_worker_id),
            _short(request.decode_worker_id),
            _age(request.create_time),
            request.error_message,
        )
    return table


def _worker_table(workers: Sequence[WorkerInfo]) -> FittedTable:
    table = _table(
        "Workers",
        "worker",
        "role",
        "address",
        "model",
        "state",
        ">running",
        ">waiting",
        ">blocks used",
        ">cached",
        ">free",
    )
    is_measured = any(worker.load.prefill_tokens_per_s for worker in workers)
    if is_measured:
        table.add_text_column("prompt tokens/s", right=True)
    speculates = any(worker.load.num_drafted_tokens for worker in workers)
    if speculates:
        table.add_text_column("guesses right", right=True)
    for worker in workers:
        load = worker.load
        table.add_texts(
            _short(worker.worker_id),
            worker.role.value,
            worker.address,
            f"{worker.model.name} ({worker.model.kv_layout.dtype})",
            _worker_state(worker),
            str(load.num_running),
            str(load.num_waiting),
            f"{load.num_used_blocks} of {load.num_blocks}",
            str(load.num_cached_blocks),
            str(load.num_free_blocks),
            *([f"{load.prefill_tokens_per_s:,.0f}" if load.prefill_tokens_per_s else "-"] if is_measured else []),
            *([_guesses(load)] if speculates else []),
        )
    return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"


def _guesses(load: WorkerLoad) -> str:
    if load.num_drafted_tokens == 0:
        return "-"
    return f"{100 * load.num_accepted_tokens / load.num_drafted_tokens:.0f} % of {load.num_drafted_tokens}"


def _gateway_table(cluster: Cluster) -> FittedTable:
    table = _table("Gateways", "gateway", "address", ">running requests")
    for gateway in cluster.gateways:
        mark = " (answers)" if gateway.gateway_id == cluster.gateway_id else ""
        table.add_texts(_short(gateway.gateway_id) + mark, gateway.address, str(gateway.num_running_requests))
    return table


def _worker_state(worker: WorkerInfo) -> Text:
    if not worker.connected:
        return Text("not connected", style="red")
    if worker.load.draining:
        return Text("draining", style="yellow")
    return Text("connected", style="green")


def _table(title: str, *columns: str) -> FittedTable:
    """Columns marked with > are aligned to the right."""
    table = FittedTable(title)
    for column in columns:
        table.add_text_column(column.removeprefix(">"), right=column.startswith(">"))
    return table


def _short(identifier: str) -> str:
    return identifier[:_NUM_ID_CHARACTERS] or "-"


def _age(moment: datetime) -> str:
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
