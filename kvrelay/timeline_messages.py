"""Conversions between the values of `kvrelay.timeline` and the messages of the protocol. Pure; checks nothing."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from kvrelay.telemetry import Phases
from kvrelay.timeline import SpanKind, Timeline, TimelineSpan, TokenRun, WorkOutcome, WorkTimeline
from kvrelay.v1 import inference_pb2
from kvrelay.wire import chunk_time_from_pb, chunk_time_to_pb


def _outcome_to_pb(outcome: WorkOutcome) -> "inference_pb2.WorkOutcome.ValueType":
    return inference_pb2.WorkOutcome.Value(f"WORK_OUTCOME_{outcome.name}")


def _kind_to_pb(kind: SpanKind) -> "inference_pb2.SpanKind.ValueType":
    return inference_pb2.SpanKind.Value(f"SPAN_KIND_{kind.name}")


_OUTCOMES = {_outcome_to_pb(outcome): outcome for outcome in WorkOutcome}
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
        works=map(_work_to_pb, timeline.works),
        num_forgotten_works=timeline.num_forgotten_works,
        phases=None if timeline.phases is None else phases_to_pb(timeline.phases),
    )


def timeline_from_pb(message: inference_pb2.Timeline) -> Timeline:
    start_time: datetime = message.start_time.ToDatetime(tzinfo=UTC)
    return Timeline(
        gateway_id=message.gateway_id,
        start_time=start_time,
        duration_ms=message.duration_ms,
        ended=message.ended,
        num_tokens_before=tuple(message.num_tokens_before),
        works=tuple(map(_work_from_pb, message.works)),
        num_forgotten_works=message.num_forgotten_works,
        phases=phases_from_pb(message.phases) if message.HasField("phases") else None,
    )


def phases_to_pb(phases: Phases) -> inference_pb2.Phases:
    return inference_pb2.Phases(**{name: getattr(phases, name) for name in Phases.__slots__})


def phases_from_pb(message: inference_pb2.Phases) -> Phases:
    return Phases(**{name: getattr(message, name) for name in Phases.__slots__})


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


def _work_to_pb(work: WorkTimeline) -> inference_pb2.WorkTimeline:
    return inference_pb2.WorkTimeline(
        **{name: getattr(work, name) for name in _PLAIN_FIELDS},
        outcome=_outcome_to_pb(work.outcome),
        spans=map(_span_to_pb, work.spans),
        prompt_chunks=map(chunk_time_to_pb, work.prompt_chunks),
        kv_chunks=map(chunk_time_to_pb, work.kv_chunks),
        token_runs=map(_run_to_pb, work.token_runs),
    )


def _work_from_pb(message: inference_pb2.WorkTimeline) -> WorkTimeline:
    return WorkTimeline(
        **{name: getattr(message, name) for name in _PLAIN_FIELDS},
        outcome=_OUTCOMES.get(message.outcome, WorkOutcome.RUNNING),
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
    return TimelineSpan(kind, message.begin_ms, message.end_ms, message.worker_id, message.unreported)


def _run_to_pb(run: TokenRun) -> inference_pb2.TokenRun:
    return inference_pb2.TokenRun(**{name: getattr(run, name) for name in TokenRun.__slots__})


def _run_from_pb(message: inference_pb2.TokenRun) -> TokenRun:
    return TokenRun(
        message.sequence,
        message.first_index,
        message.num_tokens,
        message.first_ms,
        message.last_ms,
        tuple(message.mark_ms),
        message.mark_stride,
    )
