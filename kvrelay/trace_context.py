"""Which trace a request belongs to, as W3C's `traceparent` says it. Pure: makes no ids, records no spans.

A request without a client's trace has its request id for trace id: both are 32 hexadecimal digits, and so every process knows it
without being told.
"""

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

METADATA_KEY = "traceparent"

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_NO_TRACE, _NO_SPAN = "0" * 32, "0" * 16
_FIRST_VERSION, _NO_VERSION = "00", "ff"
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span that others are to be children of."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    sampled: bool
    """Whether its spans are recorded."""

    @property
    def traceparent(self) -> str:
        """The value of the header."""
        return f"{_FIRST_VERSION}-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parse_traceparent(value: str) -> TraceContext | None:
    """What the header says; None when it is none, or of no use: then it is as if it were absent, as W3C wants."""
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == _NO_VERSION or (version == _FIRST_VERSION and rest) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def is_trace_id(text: str) -> bool:
    """Whether it may name a trace."""
    return _TRACE_ID.fullmatch(text) is not None and text != _NO_TRACE


_current: ContextVar[TraceContext | None] = ContextVar("trace of the call", default=None)


def adopt(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """The call that is being served, which has this metadata, belongs to the trace that they name, if they do."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str):
            _current.set(parse_traceparent(value))
            return


def current_trace() -> TraceContext | None:
    """Of the call that is being served; None when its client named none."""
    return _current.get()


def log_fields(request_id: str, attempt: int, trace: TraceContext | None) -> dict[str, str | int]:
    """What every line of a log has that is about a request."""
    return {"request_id": request_id, "attempt": attempt, "trace_id": request_id if trace is None else trace.trace_id}
