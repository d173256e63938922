"""Where a request's time went, as a table."""

from kvrelay.cli.views.fitted_table import FittedTable
from kvrelay.cli.views.readable_time import milliseconds
from kvrelay.client.results import Finished

_MILLION = 1e6
_WHY_NOTHING_TRAVELLED = (
    "A decode worker computes short prompts itself, and others while prefill workers are busy or away. "
    "`kvrelay serve all --local-prefill-tokens 0` sends all to the prefill worker."
)
_WAYS = {"grpc": " over gRPC", "shared-memory": " through shared memory"}


def phase_table(finished: Finished) -> FittedTable:
    phases, usage = finished.phases, finished.usage
    table = FittedTable("Phases of the request")
    table.add_text_column("phase")
    table.add_text_column("time", right=True)
    table.add_text_column("")
    prefiller = phases.decode_worker_id if phases.prefilled_on_decode_worker else phases.prefill_worker_id
    num_computed_tokens = usage.num_prompt_tokens - usage.num_cached_tokens
    table.add_texts("queue", milliseconds(phases.queue_ms), "until the prompt's pass began")
    table.add_texts(
        "prefill",
        milliseconds(phases.prefill_ms),
        f"{num_computed_tokens} of {usage.num_prompt_tokens} prompt tokens, on {prefiller}",
    )
    if phases.transfer_bytes:
        way = _WAYS.get(phases.transfer_transport, "")
        moved = f"{phases.transfer_bytes:,} bytes of KV to {phases.decode_worker_id}{way}"
        table.add_texts("transfer", milliseconds(phases.transfer_ms), moved)
        rate = gigabytes_per_second(finished)
        shown_rate = f"{rate:.3f} GB/s; " if rate is not None else ""
        table.add_texts(
            "  on the wire", milliseconds(phases.transfer_wire_ms), f"{shown_rate}the rest waited for the prompt's pass"
        )
        table.add_texts("  exposed", milliseconds(phases.exposed_transfer_ms), "not hidden behind prefill")
    else:
        table.add_texts("transfer", "-", "nothing travelled")
        if phases.prefilled_on_decode_worker:
            table.caption = _WHY_NOTHING_TRAVELLED
    table.add_texts("handoff gap", milliseconds(phases.handoff_gap_ms), "first token to second token")
    table.add_texts(
        "decode", milliseconds(phases.decode_ms), f"{usage.num_output_tokens} tokens, on {phases.decode_worker_id}"
    )
    table.add_section()
    table.add_texts("first token", milliseconds(phases.time_to_first_token_ms), "from submission (TTFT)")
    table.add_texts(
        "total",
        milliseconds(phases.total_ms),
        f"{phases.num_attempts} attempt{'s' if phases.num_attempts != 1 else ''}",
    )
    token_rate = tokens_per_second(finished)
    table.add_texts("tokens/s", f"{token_rate:.1f}" if token_rate is not None else "-", "while decoding")
    return table


def tokens_per_second(finished: Finished) -> float | None:
    """Decode rate after the first token; None if there was only one."""
    num_later_tokens = finished.usage.num_output_tokens - len(finished.finish_reasons)
    if num_later_tokens <= 0 or finished.phases.decode_ms <= 0:
        return None
    return num_later_tokens / finished.phases.decode_ms * 1000


def gigabytes_per_second(finished: Finished) -> float | None:
    """KV payload, in 10^9 bytes, per second on the wire; None without a transfer."""
    if not finished.phases.transfer_bytes or finished.phases.transfer_wire_ms <= 0:
        return None
    return finished.phases.transfer_bytes / finished.phases.transfer_wire_ms / _MILLION
