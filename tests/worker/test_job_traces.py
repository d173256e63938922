"""A worker's spans: children of the attempt that the gateway named, of jobs that are traced, and of
no others.
"""

import time

from kvrelay.core.trace_context import TraceContext
from kvrelay.worker.job_traces import JobTraces
from tests.support.jobs import make_job
from tests.support.spans import Recorded, duration_s, parent_id, span_id, trace_id

TOLERANCE_NS = 1e8
"""For two clocks that are read one after the other."""
ATTEMPT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)
TRACED = make_job([1, 2], 4, attempt=3, trace=ATTEMPT)
UNSAMPLED = make_job([1, 2], 4, "b" * 32, trace=TraceContext(ATTEMPT.trace_id, ATTEMPT.span_id, sampled=False))
UNTRACED = make_job([1, 2], 4, "c" * 32)


def test_spans_are_children_of_the_attempt_and_name_the_request() -> None:
    recorded = Recorded()
    traces = JobTraces(recorded.tracing())
    traces.begin(TRACED)
    earliest_ns = time.time_ns()
    traces.record(TRACED.job_id, "prefill", 2.0, 1.0, attributes={"kvrelay.num_cached_tokens": 16})
    span = recorded.span("prefill")
    assert (trace_id(span), parent_id(span)) == (ATTEMPT.trace_id, ATTEMPT.span_id)
    assert span_id(span) != ATTEMPT.span_id
    assert round(duration_s(span), 3) == 2.0
    assert dict(span.attributes or {}) == {
        "kvrelay.request_id": TRACED.job_id.request_id,
        "kvrelay.attempt": 3,
        "kvrelay.num_cached_tokens": 16,
    }
    assert span.end_time is not None
    assert earliest_ns - TOLERANCE_NS < span.end_time + 1e9 < time.time_ns() + TOLERANCE_NS


def test_a_span_may_have_children_before_it_is_recorded() -> None:
    recorded = Recorded()
    traces = JobTraces(recorded.tracing())
    traces.begin(TRACED)
    own = traces.new_child(TRACED.job_id)
    assert own is not None
    traces.record(TRACED.job_id, "kv.receive", 1.0, parent=own)
    traces.record(TRACED.job_id, "kv.send", 1.0, own=own)
    assert parent_id(recorded.span("kv.receive")) == span_id(recorded.span("kv.send")) == own.span_id
    assert parent_id(recorded.span("kv.send")) == ATTEMPT.span_id


def test_what_is_marked_is_recorded_once() -> None:
    recorded = Recorded()
    traces = JobTraces(recorded.tracing())
    traces.begin(TRACED)
    traces.record_since_mark(TRACED.job_id, "decode")
    traces.mark(TRACED.job_id, "decode")
    traces.record_since_mark(TRACED.job_id, "decode", error="worker_lost")
    traces.record_since_mark(TRACED.job_id, "decode")
    assert recorded.names == ["decode"]
    assert recorded.span("decode").status.description == "worker_lost"


def test_a_marked_span_lasts_from_its_mark_and_may_have_children_too() -> None:
    recorded = Recorded()
    traces = JobTraces(recorded.tracing())
    traces.begin(TRACED)
    own = traces.new_child(TRACED.job_id)
    assert own is not None
    begin = time.monotonic()
    traces.mark(TRACED.job_id, "kv.send")
    time.sleep(0.02)
    traces.record_since_mark(TRACED.job_id, "kv.send", own=own, kind="producer", error="broken off")
    assert 0.019 < duration_s(recorded.span("kv.send")) < time.monotonic() - begin + 0.001
    assert span_id(recorded.span("kv.send")) == own.span_id


def test_nothing_is_recorded_of_jobs_that_are_not_traced_or_are_over() -> None:
    recorded = Recorded()
    traces = JobTraces(recorded.tracing())
    for job in (UNSAMPLED, UNTRACED, TRACED):
        traces.begin(job)
    traces.end(TRACED.job_id)
    traces.end(TRACED.job_id)
    for job in (UNSAMPLED, UNTRACED, TRACED):
        assert traces.new_child(job.job_id) is None
        traces.mark(job.job_id, "decode")
        traces.record_since_mark(job.job_id, "decode")
        traces.record(job.job_id, "prefill", 1.0)
    assert recorded.names == []


def test_without_tracing_no_job_is_kept() -> None:
    traces = JobTraces()
    traces.begin(TRACED)
    assert traces.new_child(TRACED.job_id) is None
