"""Converts between values of `kvrelay.core.timeline` and protocol messages. Checks nothing."""

from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from kvrelay.core.timeline import JobOutcome, JobTimeline, Phases, SpanKind, Timeline, TimelineSpan, TokenRun
from kvrelay.v1 import inference_pb2
from kvrelay.wire.convert import chunk_time_from_pb, chunk_time_to_pb, milliseconds_from_pb


def _outcome_to_pb(outcome: JobOutcome) -> "inference_pb2.JobOutcome.ValueType":
    return inference_pb2.JobOutcome.Value(f"JOB_OUTCOME_{outcome.name}")


def _kind_to_pb(kind: SpanKind) -> "inference_pb2.SpanKind.ValueType":
    return inference_pb2.SpanKind.Value(f"SPAN_KIND_{kind.name}")


_OUTCOMES = {_outcome_to_pb(outcome): outcome for outcome in JobOutcome}
_SPAN_KINDS = {_kind_to_pb(kind): kind for kind in SpanKind}


def timeline_to_pb(timeline: Timeline) -> inference_pb2.Timeline:
    start_time = Timestamp()
    start_time.FromDatetime(timeline.start_time)
    return inference_pb2.Timeline(
        gateway_id=timeline.gateway_id,
        start_time=start_time,
        duration_ms=timeline.duration_ms,
        ended=timeline.ended,
        num_tokens_before=timeline.num_tokens_before,
        jobs=map(_job_to_pb, timeline.jobs),
        num_forgotten_jobs=timeline.num_forgotten_jobs,
        phases=None if timeline.phases is None else phases_to_pb(timeline.phases),
    )


def timeline_from_pb(message: inference_pb2.Timeline) -> Timeline:
    start_time: datetime = message.start_time.ToDatetime(tzinfo=UTC)
    return Timeline(
        gateway_id=message.gateway_id,
        start_time=start_time,
        duration_ms=milliseconds_from_pb(message.duration_ms),
        ended=message.ended,
        num_tokens_before=tuple(message.num_tokens_before),
        jobs=tuple(map(_job_from_pb, message.jobs)),
        num_forgotten_jobs=message.num_forgotten_jobs,
        phases=phases_from_pb(message.phases) if message.HasField("phases") else None,
    )


def phases_to_pb(phases: Phases) -> inference_pb2.Phases:
    return inference_pb2.Phases(**{name: getattr(phases, name) for name in Phases.__slots__})


def phases_from_pb(message: inference_pb2.Phases) -> Phases:
    return Phases(**{name: _plain_from_pb(getattr(message, name)) for name in Phases.__slots__})


def _plain_from_pb(value: float | str) -> Any:
    """All floats are times."""
    return milliseconds_from_pb(value) if isinstance(value, float) else value


_PLAIN_FIELDS = (
    "attempt",
    "first_sequence",
    "num_sequences",
    "begin_ms",
    "end_ms",
    "end_reason",
    "failed_worker_id",
    "prefill_worker_id",
    "decode_worker_id",
    "prefilled_on_decode_worker",
    "num_prompt_tokens",
    "num_cached_tokens",
    "kv_bytes",
    "exposed_transfer_ms",
    "transfer_wire_ms",
    "transfer_transport",
)


def _job_to_pb(job: JobTimeline) -> inference_pb2.JobTimeline:
    return inference_pb2.JobTimeline(
        **{name: getattr(job, name) for name in _PLAIN_FIELDS},
        outcome=_outcome_to_pb(job.outcome),
        spans=map(_span_to_pb, job.spans),
        prompt_chunks=map(chunk_time_to_pb, job.prompt_chunks),
        kv_chunks=map(chunk_time_to_pb, job.kv_chunks),
        token_runs=map(_run_to_pb, job.token_runs),
    )


def _job_from_pb(message: inference_pb2.JobTimeline) -> JobTimeline:
    return JobTimeline(
        **{name: _plain_from_pb(getattr(message, name)) for name in _PLAIN_FIELDS},
        outcome=_OUTCOMES.get(message.outcome, JobOutcome.RUNNING),
        spans=tuple(map(_span_from_pb, message.spans)),
        prompt_chunks=tuple(map(chunk_time_from_pb, message.prompt_chunks)),
        kv_chunks=tuple(map(chunk_time_from_pb, message.kv_chunks)),
        token_runs=tuple(map(_run_from_pb, message.token_runs)),
    )


def _span_to_pb(span: TimelineSpan) -> inference_pb2.TimelineSpan:
    return inference_pb2.TimelineSpan(
        kind=_kind_to_pb(span.kind),
        begin_ms=span.begin_ms,
        end_ms=span.end_ms,
        worker_id=span.worker_id,
        unreported=span.unreported,
    )


def _span_from_pb(message: inference_pb2.TimelineSpan) -> TimelineSpan:
    kind = _SPAN_KINDS.get(message.kind, SpanKind.ROUTE)
    return TimelineSpan(
        kind,
        milliseconds_from_pb(message.begin_ms),
        milliseconds_from_pb(message.end_ms),
        message.worker_id,
        message.unreported,
    )


def _run_to_pb(run: TokenRun) -> inference_pb2.TokenRun:
    return inference_pb2.TokenRun(**{name: getattr(run, name) for name in TokenRun.__slots__})


def _run_from_pb(message: inference_pb2.TokenRun) -> TokenRun:
    return TokenRun(
        message.sequence,
        message.first_index,
        message.num_tokens,
        milliseconds_from_pb(message.first_ms),
        milliseconds_from_pb(message.last_ms),
        tuple(map(milliseconds_from_pb, message.mark_ms)),
        message.mark_stride,
    )
