"""Spans as they are recorded, and where they go: with ids, times and parents of their owners, and
never in a process's way.
"""

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

from kvrelay.core.trace_context import TraceContext
from kvrelay.observability import tracing
from kvrelay.observability.tracing import Tracing, create_tracing, new_span_id
from tests.support.otlp_receiver import receiving
from tests.support.spans import Recorded, duration_s, parent_id, span_id, trace_id

TOLERANCE_NS = 1e8
"""For two clocks that are read one after the other."""
CONTEXT = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", sampled=True)


def test_a_span_has_the_ids_times_and_attributes_that_it_was_given() -> None:
    recorded = Recorded()
    earliest_ns = time.time_ns()
    parent, now = new_span_id(), time.monotonic()
    recorded.tracing().record(
        "prefill", CONTEXT, parent, now - 3, now - 1, kind="server", attributes={"kvrelay.attempt": 2}
    )
    span = recorded.span("prefill")
    assert (trace_id(span), span_id(span), parent_id(span)) == (CONTEXT.trace_id, CONTEXT.span_id, parent)
    assert duration_s(span) == pytest.approx(2, abs=1e-3)
    assert span.end_time is not None
    assert earliest_ns - TOLERANCE_NS < span.end_time + 1e9 < time.time_ns() + TOLERANCE_NS
    assert (span.kind, span.status.status_code, dict(span.attributes or {})) == (
        SpanKind.SERVER,
        StatusCode.UNSET,
        {"kvrelay.attempt": 2},
    )


def test_an_error_is_the_spans_status_and_a_traces_first_span_has_no_parent() -> None:
    recorded = Recorded()
    recorded.tracing().record("generate", CONTEXT, None, 1.0, 2.0, error="DEADLINE")
    span = recorded.span("generate")
    assert (span.status.status_code, span.status.description, span.parent) == (StatusCode.ERROR, "DEADLINE", None)


@pytest.mark.parametrize(("ratio", "num_sampled"), [(0.0, 0), (1.0, 100)])
def test_a_share_of_requests_is_sampled(ratio: float, num_sampled: int) -> None:
    made = Recorded().tracing(ratio)
    assert sum(made.samples() for _ in range(100)) == num_sampled


def test_a_collector_that_does_not_answer_holds_no_process_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.05)
    answered = threading.Event()

    class Stuck(SpanProcessor):
        def shutdown(self) -> None:
            answered.wait(100)

    began_at = time.monotonic()
    Tracing(Stuck(), Resource({})).close()
    assert time.monotonic() - began_at < 50
    answered.set()


async def test_spans_reach_a_collector_with_who_made_them() -> None:
    async with receiving() as collector:
        made = create_tracing(collector.endpoint, "gateway", "gateway-1")
        assert made is not None
        made.record("generate", CONTEXT, None, 1.0, 2.0)
        await asyncio.to_thread(made.close)
        (span,) = collector.of_trace(CONTEXT.trace_id)
    assert (span.service, span.instance, span.name) == ("kvrelay-gateway", "gateway-1", "generate")


def test_without_an_endpoint_there_is_none() -> None:
    assert create_tracing(None, "gateway", "gateway-1") is None


def test_a_missing_library_is_named_with_what_installs_it() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk.resources"] = None
sys.modules["opentelemetry.exporter"] = None
from kvrelay.errors import StartupError
from kvrelay.observability.tracing import create_tracing
try:
    create_tracing("http://127.0.0.1:1", "gateway", "gateway-1")
except StartupError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install '.[otel]'" in done.stdout
