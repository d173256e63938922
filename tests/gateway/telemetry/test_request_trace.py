"""A request's spans at its gateway: the request, its attempts, and their queue time."""

import pytest
from opentelemetry.trace import SpanKind

from gateway.telemetry.request_trace import RequestTrace
from kvrelay.core.request_state import RequestState
from kvrelay.core.trace_context import TraceContext
from kvrelay.errors import DeadlineError
from tests.support.spans import Recorded, duration_s, parent_id, span_id, trace_id

REQUEST_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
INCOMING = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)


def test_a_request_has_a_span_for_itself_each_attempt_and_each_wait_for_the_prompt() -> None:
    recorded = Recorded()
    trace = RequestTrace(REQUEST_ID, None, recorded.tracing())
    trace.begin_attempt(1, 10.0)
    trace.on_prompt_sent(11.0)
    trace.on_prompt_sent(11.5)  # a second job of the attempt
    trace.begin_attempt(2, 13.0, "worker_lost")
    trace.on_prompt_sent(13.5)
    trace.end(RequestState.SUCCEEDED, None, 9.0, 20.0, {"gen_ai.usage.output_tokens": 5})
    assert recorded.names == ["queue", "attempt", "queue", "attempt", "generate"]
    queue, first, later_queue, second, root = recorded.kept.spans
    assert {trace_id(span) for span in recorded.kept.spans} == {REQUEST_ID}
    assert (parent_id(root), parent_id(first), parent_id(second)) == (None, span_id(root), span_id(root))
    assert (parent_id(queue), parent_id(later_queue)) == (span_id(first), span_id(second))
    assert [round(duration_s(span), 3) for span in recorded.kept.spans] == [1.0, 3.0, 0.5, 7.0, 11.0]
    assert (first.status.description, second.status.description, root.status.description) == ("worker_lost", None, None)
    assert root.kind is SpanKind.SERVER
    assert dict(root.attributes or {}) == {
        "kvrelay.request_id": REQUEST_ID,
        "kvrelay.state": "SUCCEEDED",
        "gen_ai.usage.output_tokens": 5,
    }
    assert (second.attributes or {})["kvrelay.attempt"] == 2


def test_the_clients_trace_is_continued() -> None:
    recorded = Recorded()
    trace = RequestTrace(REQUEST_ID, INCOMING, recorded.tracing(0.0))  # the client decides
    trace.begin_attempt(1, 1.0)
    handed_on = trace.for_workers
    trace.end(RequestState.EXPIRED, DeadlineError("late"), 0.0, 2.0)
    attempt, root = recorded.kept.spans
    assert (trace_id(root), parent_id(root)) == (INCOMING.trace_id, INCOMING.span_id)
    assert handed_on == TraceContext(INCOMING.trace_id, span_id(attempt), sampled=True)
    assert (attempt.status.description, root.status.description) == ("DEADLINE", "DEADLINE")


@pytest.mark.parametrize(
    ("incoming", "ratio"), [(TraceContext(INCOMING.trace_id, INCOMING.span_id, sampled=False), 1.0), (None, 0.0)]
)
def test_an_unsampled_request_records_no_spans_but_has_a_trace_id_for_logs(
    incoming: TraceContext | None, ratio: float
) -> None:
    recorded = Recorded()
    trace = RequestTrace(REQUEST_ID, incoming, recorded.tracing(ratio))
    trace.begin_attempt(1, 1.0)
    trace.on_prompt_sent(2.0)
    assert trace.for_workers == incoming
    trace.end(RequestState.SUCCEEDED, None, 0.0, 3.0)
    assert recorded.names == []
    assert trace.log_fields(1)["trace_id"] == (REQUEST_ID if incoming is None else incoming.trace_id)


def test_without_a_collector_workers_get_no_trace() -> None:
    trace = RequestTrace(REQUEST_ID)
    trace.begin_attempt(1, 1.0)
    trace.end(RequestState.SUCCEEDED, None, 0.0, 3.0)
    assert trace.for_workers is None
