"""What `kvrelay top` shows: load and rates between two answers of a gateway."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from kvrelay.cli.views.fitted_table import FittedTable
from kvrelay.cli.views.status_tables import degraded_line, problem_lines
from kvrelay.cli.views.waterfall import short_id
from kvrelay.client.results import Cluster, RequestInfo, WorkerInfo, WorkerRole

BAR_WIDTH = 24
MAX_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Rates:
    tokens_per_s: float
    kv_bytes_per_s: float


def rates_between(before: tuple[float, Cluster] | None, now: tuple[float, Cluster]) -> Rates | None:
    """Takes monotonic seconds and answers. None without an earlier answer of the same gateway."""
    if before is None or before[1].gateway_id != now[1].gateway_id or now[0] <= before[0]:
        return None
    seconds = now[0] - before[0]
    num_tokens = now[1].num_output_tokens - before[1].num_output_tokens
    return Rates(max(num_tokens, 0) / seconds, max(_kv_bytes(now[1]) - _kv_bytes(before[1]), 0) / seconds)


def top_view(cluster: Cluster, requests: Sequence[RequestInfo], rates: Rates | None) -> RenderableType:
    """Running requests come first."""
    parts: list[RenderableType] = [_figures(cluster, rates)]
    if cluster.degraded:
        parts.append(Text(degraded_line(cluster), style="yellow"))
    parts += [_workers(cluster.workers), *problem_lines(cluster)]
    if cluster.transfers:
        parts.append(_transfers(cluster))
    if requests:
        parts.append(_requests(requests))
    return Group(*parts)


def _figures(cluster: Cluster, rates: Rates | None) -> Text:
    running = sum(gateway.num_running_requests for gateway in cluster.gateways)
    line = Text.assemble(("kvrelay", "bold"), f"  {cluster.gateway_id}   ", (f"{running}", "bold"), " running   ")
    tokens = "-" if rates is None else f"{rates.tokens_per_s:,.1f}"
    kv = "-" if rates is None else f"{rates.kv_bytes_per_s / 1e6:,.1f}"
    line.append(tokens, "bold green").append(" tokens/s   ")
    line.append(kv, "bold magenta").append(f" MB/s of KV, {_kv_bytes(cluster) / 1e6:,.1f} MB so far")
    return line


def _workers(workers: Sequence[WorkerInfo]) -> FittedTable:
    table = FittedTable(plain=True)
    for title in ("worker", "state", "running", "waiting", "KV blocks", "used", "cached", "total"):
        table.add_text_column(title, right=title in ("running", "waiting", "used", "cached", "total"))
    for worker in workers:
        load = worker.load
        state = "not connected" if not worker.connected else "draining" if load.draining else "connected"
        style = {"not connected": "red", "draining": "yellow"}.get(state, "green")
        numbers = (load.num_used_blocks, load.num_cached_blocks, load.num_blocks)
        table.add_texts(
            short_id(worker.worker_id),
            Text(state, style),
            str(load.num_running),
            str(load.num_waiting),
            _fill(worker),
            *map(str, numbers),
        )
    return table


def _fill(worker: WorkerInfo) -> Text:
    total = max(worker.load.num_blocks, 1)
    used = -(-worker.load.num_used_blocks * BAR_WIDTH // total)
    cached = min(round(worker.load.num_cached_blocks * BAR_WIDTH / total), BAR_WIDTH - used)
    style = "blue" if worker.role is WorkerRole.PREFILL else "green"
    return Text.assemble(
        ("█" * used, style), ("▒" * cached, "bright_black"), ("·" * (BAR_WIDTH - used - cached), "bright_black")
    )


def _transfers(cluster: Cluster) -> FittedTable:
    table = FittedTable(plain=True)
    for title in ("KV from", "to", "transfers", "MB", "GB/s"):
        table.add_text_column(title, right=title not in ("KV from", "to"))
    for total in cluster.transfers:
        rate = f"{total.kv_bytes / total.wire_ms / 1e6:.2f}" if total.wire_ms else "-"
        megabytes = f"{total.kv_bytes / 1e6:,.1f}"
        table.add_texts(
            short_id(total.prefill_worker_id),
            short_id(total.decode_worker_id),
            str(total.num_transfers),
            megabytes,
            rate,
        )
    return table


def _requests(requests: Sequence[RequestInfo]) -> FittedTable:
    table = FittedTable(plain=True)
    for title in ("request", "state", "attempt", "prompt", "output", "prefill", "decode"):
        table.add_text_column(title, right=title in ("attempt", "prompt", "output"))
    # Running ones first. The sort is stable, so each half stays newest first.
    ordered = sorted(requests, key=lambda request: request.state.final)
    for request in ordered[:MAX_REQUESTS]:
        style = "" if not request.state.final else "green" if request.state.value == "succeeded" else "red"
        table.add_texts(
            request.request_id,
            Text(request.state.value, style),
            Text(str(request.attempt), "yellow" if request.attempt > 1 else ""),
            str(request.num_prompt_tokens),
            str(request.num_output_tokens),
            short_id(request.prefill_worker_id) or "-",
            short_id(request.decode_worker_id) or "-",
        )
    return table


def _kv_bytes(cluster: Cluster) -> int:
    return sum(total.kv_bytes for total in cluster.transfers)
