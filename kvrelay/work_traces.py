"""The spans of a worker's works: children of the attempt that a gateway gave it. Lives on the worker's event loop.

Costs a look into an empty dictionary where nothing is traced, and never anything for a token.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay.trace_context import TraceContext
from kvrelay.tracing import NO_ATTRIBUTES, AttributeValue, Kind, Tracing, new_span_id
from kvrelay.work import Work, WorkId


@dataclass(slots=True)
class _TracedWork:
    """A work whose attempt is sampled; marks are monotonic seconds by name."""

    context: TraceContext
    marks: dict[str, float] = field(default_factory=dict)


class WorkTraces:
    """All works of a worker that are traced.

    Args:
        tracing: where spans go; None traces nothing.
    """

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._works: dict[WorkId, _TracedWork] = {}

    def begin(self, work: Work) -> None:
        """A work was taken on."""
        if self._tracing is not None and work.trace is not None and work.trace.sampled:
            self._works[work.work_id] = _TracedWork(work.trace)

    def end(self, work_id: WorkId) -> None:
        """Nothing of the work is left. Idempotent."""
        self._works.pop(work_id, None)

    def new_child(self, work_id: WorkId) -> TraceContext | None:
        """Ids for a span that others will be children of, before it is recorded; None when the work is not traced."""
        traced = self._works.get(work_id)
        return None if traced is None else TraceContext(traced.context.trace_id, new_span_id(), sampled=True)

    def mark(self, work_id: WorkId, name: str) -> None:
        """A span of that name begins."""
        if traced := self._works.get(work_id):
            traced.marks[name] = time.monotonic()

    def record_since_mark(
        self,
        work_id: WorkId,
        name: str,
        *,
        own: TraceContext | None = None,
        kind: Kind = "internal",
        error: str = "",
        attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES,
    ) -> None:
        """The span that was marked ends, if there is one. Arguments as of `record`."""
        traced = self._works.get(work_id)
        if traced is not None and (began_at := traced.marks.pop(name, None)) is not None:
            duration_s = time.monotonic() - began_at
            self.record(work_id, name, duration_s, own=own, kind=kind, error=error, attributes=attributes)

    def record(
        self,
        work_id: WorkId,
        name: str,
        duration_s: float,
        ended_s_ago: float = 0.0,
        *,
        own: TraceContext | None = None,
        parent: TraceContext | None = None,
        kind: Kind = "internal",
        error: str = "",
        attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES,
    ) -> None:
        """A span of the work has ended.

        Args:
            work_id: whose.
            name: what it was.
            duration_s: how long, in seconds.
            ended_s_ago: since when it has been over, in seconds.
            own: its ids, where they were handed out before.
            parent: its parent, where that is not the attempt.
            kind, error, attributes: as of Tracing.record.
        """
        traced = self._works.get(work_id)
        if traced is None or self._tracing is None:
            return
        attempt = traced.context
        ended_at = time.monotonic() - ended_s_ago
        self._tracing.record(
            name,
            own or TraceContext(attempt.trace_id, new_span_id(), sampled=True),
            (parent or attempt).span_id,
            ended_at - duration_s,
            ended_at,
            kind=kind,
            error=error,
            attributes={"kvrelay.request_id": work_id.request_id, "kvrelay.attempt": work_id.attempt, **attributes},
        )
