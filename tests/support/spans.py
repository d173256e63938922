"""Keeps spans instead of sending them to a collector."""

from dataclasses import dataclass, field

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanContext

from kvrelay.observability.tracing import Tracing


class KeptSpans(SpanProcessor):
    """In the order in which they ended."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


@dataclass(slots=True)
class Recorded:
    """Tracing, and what it has recorded."""

    kept: KeptSpans = field(default_factory=KeptSpans)

    def tracing(self, ratio: float = 1.0) -> Tracing:
        return Tracing(self.kept, Resource({}), ratio)

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.kept.spans]

    def span(self, name: str) -> ReadableSpan:
        """The only one of that name."""
        (found,) = (span for span in self.kept.spans if span.name == name)
        return found


def span_id(span: ReadableSpan) -> str:
    """16 hexadecimal digits."""
    return f"{_context(span).span_id:016x}"


def trace_id(span: ReadableSpan) -> str:
    """32 hexadecimal digits."""
    return f"{_context(span).trace_id:032x}"


def parent_id(span: ReadableSpan) -> str | None:
    """16 hexadecimal digits; None for a trace's first span."""
    return None if span.parent is None else f"{span.parent.span_id:016x}"


def duration_s(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def _context(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context
