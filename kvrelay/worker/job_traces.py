"""Records spans of a worker's jobs, as children of the gateway's attempt."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvrelay.core.job import Job, JobId
from kvrelay.core.trace_context import TraceContext
from kvrelay.observability.tracing import NO_ATTRIBUTES, AttributeValue, Kind, Tracing, new_span_id


@dataclass(slots=True)
class _TracedJob:
    """Marks: monotonic seconds by span name."""

    context: TraceContext
    marks: dict[str, float] = field(default_factory=dict)


class JobTraces:
    """All traced jobs of a worker. Lives on its event loop."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._jobs: dict[JobId, _TracedJob] = {}

    def begin(self, job: Job) -> None:
        if self._tracing is not None and job.trace is not None and job.trace.sampled:
            self._jobs[job.job_id] = _TracedJob(job.trace)

    def end(self, job_id: JobId) -> None:
        self._jobs.pop(job_id, None)

    def new_child(self, job_id: JobId) -> TraceContext | None:
        """Ids of a span whose children end before it."""
        traced = self._jobs.get(job_id)
        return None if traced is None else TraceContext(traced.context.trace_id, new_span_id(), sampled=True)

    def mark(self, job_id: JobId, name: str) -> None:
        if traced := self._jobs.get(job_id):
            traced.marks[name] = time.monotonic()

    def record_since_mark(
        self,
        job_id: JobId,
        name: str,
        *,
        own: TraceContext | None = None,
        kind: Kind = "internal",
        error: str = "",
        attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES,
    ) -> None:
        traced = self._jobs.get(job_id)
        if traced is not None and (began_at := traced.marks.pop(name, None)) is not None:
            duration_s = time.monotonic() - began_at
            self.record(job_id, name, duration_s, own=own, kind=kind, error=error, attributes=attributes)

    def record(
        self,
        job_id: JobId,
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
        """Records a finished span of the job.

        Args:
            ended_s_ago: age of its end.
            own: its ids, if `new_child` gave them.
            parent: by default the attempt.
        """
        traced = self._jobs.get(job_id)
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
            attributes={"kvrelay.request_id": job_id.request_id, "kvrelay.attempt": job_id.attempt, **attributes},
        )
