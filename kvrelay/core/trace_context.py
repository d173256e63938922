"""W3C's `traceparent`. Makes no ids, records no spans.

Without a client's trace, the request id is the trace id, so every process knows it.
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
    """Ids are 32 and 16 hexadecimal digits."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"{_FIRST_VERSION}-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parse_traceparent(value: str) -> TraceContext | None:
    """Returns None for an invalid header."""
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == _NO_VERSION or (version == _FIRST_VERSION and rest) or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def is_trace_id(text: str) -> bool:
    return _TRACE_ID.fullmatch(text) is not None and text != _NO_TRACE


_current: ContextVar[TraceContext | None] = ContextVar("trace of the call", default=None)


def adopt(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Sets the trace of the current call."""
    for key, value in metadata:
        if key == METADATA_KEY and isinstance(value, str):
            _current.set(parse_traceparent(value))
            return


def current_trace() -> TraceContext | None:
    return _current.get()


def log_fields(request_id: str, attempt: int, trace: TraceContext | None) -> dict[str, str | int]:
    return {"request_id": request_id, "attempt": attempt, "trace_id": request_id if trace is None else trace.trace_id}
