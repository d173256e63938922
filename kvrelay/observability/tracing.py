"""Sends spans to an OpenTelemetry collector, as OTLP over HTTP.

Owners record a span when it ended, with its times and ids: a dying process leaves no partial span.
Imports opentelemetry only with an endpoint.
"""

from __future__ import annotations  # opentelemetry's classes are named for type checkers only

import random
import secrets
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import kvrelay
from kvrelay.core.trace_context import TraceContext
from kvrelay.errors import StartupError
from kvrelay.runtime.extras import missing_extra

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

Kind = Literal["server", "internal", "producer", "consumer"]
AttributeValue = str | int | float | bool
NO_ATTRIBUTES: Mapping[str, AttributeValue] = MappingProxyType({})

EXPORT_INTERVAL_MS = 1000
CLOSE_TIMEOUT_S = 2.0
TRACES_PATH = "/v1/traces"


def new_span_id() -> str:
    """16 hexadecimal digits."""
    return secrets.token_hex(8)


class Tracing:
    """Takes spans from any thread. `ratio` of the requests are traced if their clients do not
    decide.
    """

    def __init__(self, processor: SpanProcessor, resource: Resource, ratio: float = 1.0) -> None:
        self._processor = processor
        self._resource = resource
        self._ratio = ratio

    def samples(self) -> bool:
        return random.random() < self._ratio

    def record(
        self,
        name: str,
        context: TraceContext,
        parent_span_id: str | None,
        began_at: float,
        ended_at: float,
        *,
        kind: Kind = "internal",
        error: str = "",
        attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES,
    ) -> None:
        """`began_at` and `ended_at` are monotonic seconds; `error` is empty on success."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now_ns, now = time.time_ns(), time.monotonic()
        span = ReadableSpan(
            name=name,
            context=_span_context(context.trace_id, context.span_id),
            parent=_span_context(context.trace_id, parent_span_id) if parent_span_id else None,
            resource=self._resource,
            attributes=dict(attributes),
            kind=SpanKind[kind.upper()],
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
            start_time=now_ns - int((now - began_at) * 1e9),
            end_time=now_ns - int((now - ended_at) * 1e9),
        )
        self._processor.on_end(span)

    def close(self) -> None:
        closing = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


def create_tracing(endpoint: str | None, role: str, instance_id: str, ratio: float = 1.0) -> Tracing | None:
    """None without an `endpoint`, a URL without path; StartupError without opentelemetry."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise StartupError(
            f"--otlp-endpoint needs {error.name}, which is not installed; {missing_extra('otel')}"
        ) from None
    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(endpoint=url if url.endswith(TRACES_PATH) else url + TRACES_PATH)
    resource = Resource.create(
        {
            "service.namespace": "kvrelay",
            "service.name": f"kvrelay-{role}",
            "service.instance.id": instance_id,
            "service.version": kvrelay.__version__,
        }
    )
    return Tracing(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_INTERVAL_MS), resource, ratio)


def _span_context(trace_id: str, span_id: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
