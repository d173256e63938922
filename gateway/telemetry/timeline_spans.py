"""Makes a request's timeline: places workers' durations on the gateway's clock. Pure.

    gateway   StartPrefill sent |------------------------------------| PrefillDone came
    worker                          |queue_ms |<----- prefill_ms --->|

A phase ends when its report came, and never begins before the command that asked for it.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from gateway.telemetry.request_timeline import JobRecord, RequestTimeline, TokenMarks
from kvrelay.core.chunk_times import ChunkTime
from kvrelay.core.timeline import JobTimeline, SpanKind, Timeline, TimelineSpan, TokenRun


def timeline_of(recorded: RequestTimeline, gateway_id: str, now: float) -> Timeline:
    end = recorded.ended if recorded.ended is not None else recorded.ms_since_start(now)
    return Timeline(
        gateway_id=gateway_id,
        start_time=datetime.fromtimestamp(recorded.start_time_s, UTC),
        duration_ms=end,
        ended=recorded.ended is not None,
        num_tokens_before=recorded.num_tokens_before,
        jobs=tuple(_job_timeline(record, end) for record in recorded.jobs.values()),
        num_forgotten_jobs=recorded.num_forgotten_jobs,
        phases=recorded.phases,
    )


def _job_timeline(record: JobRecord, now: float) -> JobTimeline:
    end = record.ended if record.ended is not None else now
    transfer = record.transfer
    return JobTimeline(
        attempt=record.job_id.attempt,
        first_sequence=record.job_id.first_sequence,
        num_sequences=record.num_sequences,
        begin_ms=record.began,
        end_ms=end,
        outcome=record.outcome,
        end_reason=record.end_reason,
        failed_worker_id=record.failed_worker_id,
        prefill_worker_id=record.prefill_worker_id or "",
        decode_worker_id=record.decode_worker_id or "",
        prefilled_on_decode_worker=record.is_local_prompt,
        spans=tuple(span for span in _spans(record, end) if span is not None),
        prompt_chunks=_placed(record.prompt_chunks, _pass_begin(record), record.prompt_done),
        kv_chunks=_placed(record.kv_chunks, _transfer_begin(record), record.transfer_done),
        num_prompt_tokens=record.num_prompt_tokens,
        num_cached_tokens=record.num_cached_tokens,
        kv_bytes=record.kv_bytes,
        exposed_transfer_ms=transfer.exposed_ms if transfer else 0.0,
        transfer_wire_ms=transfer.wire_ms if transfer else 0.0,
        transfer_transport=transfer.transport if transfer else "",
        token_runs=tuple(_token_run(sequence, marks) for sequence, marks in sorted(record.runs.items())),
    )


def _spans(record: JobRecord, end: float) -> Iterable[TimelineSpan | None]:
    decode = record.decode_worker_id or ""
    yield _span(SpanKind.ROUTE, record.began, record.reserve_sent, end)
    yield _span(SpanKind.RESERVE, record.reserve_sent, record.reserved, end, decode)
    yield from _prompt_spans(record, end)
    yield _transfer_span(record, end)
    yield _decode_span(record, end, decode)


def _prompt_spans(record: JobRecord, end: float) -> Iterable[TimelineSpan | None]:
    worker_id = (record.decode_worker_id if record.is_local_prompt else record.prefill_worker_id) or ""
    begin = _pass_begin(record)
    if begin is None:
        # Without a report, only the command is known.
        yield _span(SpanKind.PREFILL, record.prompt_sent, None, end, worker_id)
        return
    queued = max(begin - record.queue_ms, record.prompt_sent or begin)
    yield _span(SpanKind.PROMPT_QUEUE, queued, begin, end, worker_id)
    yield _span(SpanKind.PREFILL, begin, record.prompt_done, end, worker_id)


def _transfer_span(record: JobRecord, end: float) -> TimelineSpan | None:
    worker_id = record.prefill_worker_id or ""
    if record.transfer is not None:
        if record.transfer.kv_bytes == 0:
            return None
        return _span(SpanKind.TRANSFER, _transfer_begin(record), record.transfer_done, end, worker_id)
    if record.is_local_prompt or record.prompt_done is None or record.num_finished_sequences == record.num_sequences:
        return None
    until = record.decode_started if record.decode_started is not None else end
    return TimelineSpan(SpanKind.TRANSFER, record.prompt_done, until, worker_id, unreported=True)


def _decode_span(record: JobRecord, end: float, worker_id: str) -> TimelineSpan | None:
    if record.decode_started is None:
        return None
    last = max((marks.last for marks in record.runs.values()), default=record.decode_started)
    is_over = record.num_finished_sequences == record.num_sequences
    return _span(
        SpanKind.DECODE, record.decode_started, max(last, record.decode_started) if is_over else None, end, worker_id
    )


def _span(
    kind: SpanKind, begin: float | None, end: float | None, now: float, worker_id: str = ""
) -> TimelineSpan | None:
    """Without an end it lasts until now."""
    if begin is None:
        return None
    return TimelineSpan(kind, begin, max(now if end is None else end, begin), worker_id, unreported=end is None)


def _pass_begin(record: JobRecord) -> float | None:
    """None before the worker's report."""
    if record.prompt_done is None:
        return None
    return max(record.prompt_done - record.prefill_ms, record.prompt_sent or 0.0)


def _transfer_begin(record: JobRecord) -> float | None:
    if record.transfer is None or record.transfer_done is None:
        return None
    return max(record.transfer_done - record.transfer.transfer_ms, record.prompt_sent or 0.0)


def _placed(chunks: tuple[ChunkTime, ...], begin: float | None, end: float | None) -> tuple[ChunkTime, ...]:
    """Chunks with times since the start of the request, cut to their phase."""
    if begin is None or end is None:
        return ()
    return tuple(_move(chunk, begin, max(end, begin)) for chunk in chunks)


def _move(chunk: ChunkTime, begin: float, end: float) -> ChunkTime:
    first = min(begin + max(chunk.begin_ms, 0.0), end)
    last = min(max(begin + chunk.end_ms, first), end)
    return replace(chunk, begin_ms=first, end_ms=last)


def _token_run(sequence: int, marks: TokenMarks) -> TokenRun:
    return TokenRun(
        sequence, marks.first_index, marks.num_tokens, marks.first, marks.last, tuple(marks.marks), marks.stride
    )
