"""Where a request's time went, as a table for people."""

from rich.table import Table

from kvrelay.client.results import Finished

_MILLION = 1e6
_WAYS = {"grpc": " over gRPC", "shared-memory": " through shared memory"}


def phase_table(finished: Finished) -> Table:
    """One row for each phase; the last column says what the number means or who did it."""
    phases, usage = finished.phases, finished.usage
    table = Table(title="Phases of the request", title_justify="left")
    table.add_column("phase")
    table.add_column("time", justify="right")
    table.add_column("")
    prefiller = phases.decode_worker_id if phases.prefilled_on_decode_worker else phases.prefill_worker_id
    num_computed_tokens = usage.num_prompt_tokens - usage.num_cached_tokens
    table.add_row("queue", _ms(phases.queue_ms), "until the prompt's pass began")
    table.add_row(
        "prefill", _ms(phases.prefill_ms), f"{num_computed_tokens} of {usage.num_prompt_tokens} prompt tokens, on {prefiller}"
    )
    if phases.transfer_bytes:
        way = _WAYS.get(phases.transfer_transport, "")
        moved = f"{phases.transfer_bytes:,} bytes of KV to {phases.decode_worker_id}{way}"
        table.add_row("transfer", _ms(phases.transfer_ms), moved)
        rate = gigabytes_per_second(finished)
        shown_rate = f"{rate:.3f} GB/s; " if rate is not None else ""
        table.add_row("  on the wire", _ms(phases.transfer_wire_ms), f"{shown_rate}the rest waited for the prompt's pass")
        table.add_row("  exposed", _ms(phases.exposed_transfer_ms), "not hidden behind prefill")
    else:
        table.add_row("transfer", "-", "nothing travelled")
    table.add_row("handoff gap", _ms(phases.handoff_gap_ms), "first token to second token")
    table.add_row("decode", _ms(phases.decode_ms), f"{usage.num_output_tokens} tokens, on {phases.decode_worker_id}")
    table.add_section()
    table.add_row("first token", _ms(phases.time_to_first_token_ms), "from submission (TTFT)")
    table.add_row("total", _ms(phases.total_ms), f"{phases.num_attempts} attempt{'s' if phases.num_attempts != 1 else ''}")
    token_rate = tokens_per_second(finished)
    table.add_row("tokens/s", f"{token_rate:.1f}" if token_rate is not None else "-", "while decoding")
    return table


def tokens_per_second(finished: Finished) -> float | None:
    """Tokens after the first per second of decode; None when there was only one."""
    num_later_tokens = finished.usage.num_output_tokens - len(finished.finish_reasons)
    if num_later_tokens <= 0 or finished.phases.decode_ms <= 0:
        return None
    return num_later_tokens / finished.phases.decode_ms * 1000


def gigabytes_per_second(finished: Finished) -> float | None:
    """KV payload per second in which some of it was under way, in 10^9 bytes; None when nothing was transferred."""
    if not finished.phases.transfer_bytes or finished.phases.transfer_wire_ms <= 0:
        return None
    return finished.phases.transfer_bytes / finished.phases.transfer_wire_ms / _MILLION


def _ms(value: float) -> str:
    return f"{value:,.1f} ms"
