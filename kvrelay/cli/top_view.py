"""What `kvrelay top` shows: load and rates, from what a gateway says again and again. Pure; callers tell the time."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvrelay.cli.waterfall import short
from kvrelay.client.results import Cluster, RequestInfo, WorkerInfo, WorkerRole

BAR_WIDTH = 24
MAX_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Rates:
    """Between two looks."""

    tokens_per_s: float
    kv_bytes_per_s: float


def rates_between(before: tuple[float, Cluster] | None, now: tuple[float, Cluster]) -> Rates | None:
    """How fast tokens and KV came; None without a look before, or when another gateway answered.

    Args:
        before, now: monotonic seconds, and what was said then.
    """
    if before is None or before[1].gateway_id != now[1].gateway_id or now[0] <= before[0]:
        return None
    seconds = now[0] - before[0]
    num_tokens = now[1].num_output_tokens - before[1].num_output_tokens
    return Rates(max(num_tokens, 0) / seconds, max(_kv_bytes(now[1]) - _kv_bytes(before[1]), 0) / seconds)


def top_view(cluster: Cluster, requests: Sequence[RequestInfo], rates: Rates | None) -> RenderableType:
    """One line of figures, the workers, and the last requests: those that run first."""
    parts: list[RenderableType] = [_figures(cluster, rates)]
    if cluster.degraded:
        parts.append(Text("degraded: Redis does not answer, so request state is not kept", style="yellow"))
    parts.append(_workers(cluster.workers))
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


def _workers(workers: Sequence[WorkerInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("worker", "state", "running", "waiting", "KV blocks", "used", "cached", "total"):
        table.add_column(title, justify="right" if title in ("running", "waiting", "used", "cached", "total") else "left")
    for worker in workers:
        load = worker.load
        state = "not connected" if not worker.connected else "draining" if load.draining else "connected"
        style = {"not connected": "red", "draining": "yellow"}.get(state, "green")
        numbers = (load.num_used_blocks, load.num_cached_blocks, load.num_blocks)
        table.add_row(
            Text(short(worker.worker_id)),
            Text(state, style),
            str(load.num_running),
            str(load.num_waiting),
            _fill(worker),
            *map(str, numbers),
        )
    return table


def _fill(worker: WorkerInfo) -> Text:
    """How full the pool is: used, cached, free."""
    total = max(worker.load.num_blocks, 1)
    used = -(-worker.load.num_used_blocks * BAR_WIDTH // total)
    cached = min(round(worker.load.num_cached_blocks * BAR_WIDTH / total), BAR_WIDTH - used)
    style = "blue" if worker.role is WorkerRole.PREFILL else "green"
    return Text.assemble(("█" * used, style), ("▒" * cached, "bright_black"), ("·" * (BAR_WIDTH - used - cached), "bright_black"))


def _transfers(cluster: Cluster) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("KV from", "to", "transfers", "MB", "GB/s"):
        table.add_column(title, justify="left" if title in ("KV from", "to") else "right")
    for total in cluster.transfers:
        rate = f"{total.kv_bytes / total.wire_ms / 1e6:.2f}" if total.wire_ms else "-"
        megabytes = f"{total.kv_bytes / 1e6:,.1f}"
        table.add_row(short(total.prefill_worker_id), short(total.decode_worker_id), str(total.num_transfers), megabytes, rate)
    return table


def _requests(requests: Sequence[RequestInfo]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("request", "state", "attempt", "prompt", "output", "prefill", "decode"):
        table.add_column(title, justify="right" if title in ("attempt", "prompt", "output") else "left")
    ordered = sorted(requests, key=lambda request: request.state.final)  # stable: newest first within each
    for request in ordered[:MAX_REQUESTS]:
        style = "" if not request.state.final else "green" if request.state.value == "succeeded" else "red"
        table.add_row(
            request.request_id,
            Text(request.state.value, style),
            Text(str(request.attempt), "yellow" if request.attempt > 1 else ""),
            str(request.num_prompt_tokens),
            str(request.num_output_tokens),
            short(request.prefill_worker_id) or "-",
            short(request.decode_worker_id) or "-",
        )
    return table


def _kv_bytes(cluster: Cluster) -> int:
    return sum(total.kv_bytes for total in cluster.transfers)
