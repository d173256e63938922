"""The spans of one request at its gateway.

    generate  ├─ attempt ├─ queue   (the workers' prefill, kv.send, kv.receive, decode are children)
              └─ attempt └─ ...

Without tracing it still has the trace id, for logs.
"""

from collections.abc import Mapping

from kvrelay.core.request_state import RequestState
from kvrelay.core.trace_context import TraceContext, is_trace_id, log_fields
from kvrelay.errors import KvrelayError
from kvrelay.observability.tracing import NO_ATTRIBUTES, AttributeValue, Tracing, new_span_id


class RequestTrace:
    """Takes monotonic seconds. `incoming` is the trace that the client named."""

    def __init__(self, request_id: str, incoming: TraceContext | None = None, tracing: Tracing | None = None) -> None:
        self._request_id = request_id
        self._incoming = incoming
        self._tracing: Tracing | None = None
        self._root: TraceContext | None = None
        self._attempt: TraceContext | None = None
        self._attempt_number = 0
        self._attempt_began_at = 0.0
        self._awaits_prompt = False
        trace_id = request_id if incoming is None else incoming.trace_id
        if tracing is None or not is_trace_id(trace_id):
            return
        if tracing.samples() if incoming is None else incoming.sampled:
            self._tracing = tracing
            self._root = TraceContext(trace_id, new_span_id(), sampled=True)

    @property
    def for_workers(self) -> TraceContext | None:
        """The parent of the workers' spans."""
        return self._attempt or self._incoming

    def log_fields(self, attempt: int) -> dict[str, str | int]:
        return log_fields(self._request_id, attempt, self._incoming)

    def begin_attempt(self, number: int, now: float, cause: str = "") -> None:
        """`cause`: why the attempt before failed."""
        if self._root is None:
            return
        self._end_attempt(now, cause)
        self._attempt = TraceContext(self._root.trace_id, new_span_id(), sampled=True)
        self._attempt_number, self._attempt_began_at, self._awaits_prompt = number, now, True

    def on_prompt_sent(self, now: float) -> None:
        if self._awaits_prompt and self._attempt is not None:
            self._awaits_prompt = False
            self._record("queue", self._child(), self._attempt, self._attempt_began_at, now)

    def end(
        self,
        state: RequestState,
        error: KvrelayError | None,
        began_at: float,
        now: float,
        attributes: Mapping[str, AttributeValue] = NO_ATTRIBUTES,
    ) -> None:
        if self._tracing is None or self._root is None:
            return
        problem = "" if error is None else error.reason
        self._end_attempt(now, problem)
        parent_span_id = None if self._incoming is None else self._incoming.span_id
        self._tracing.record(
            "generate",
            self._root,
            parent_span_id,
            began_at,
            now,
            kind="server",
            error=problem,
            attributes={"kvrelay.request_id": self._request_id, "kvrelay.state": state.value, **attributes},
        )

    def _end_attempt(self, now: float, problem: str) -> None:
        if self._attempt is not None:
            self._record("attempt", self._attempt, self._root, self._attempt_began_at, now, problem)
            self._attempt = None

    def _child(self) -> TraceContext:
        assert self._root is not None, "it is traced"
        return TraceContext(self._root.trace_id, new_span_id(), sampled=True)

    def _record(
        self,
        name: str,
        own: TraceContext,
        parent: TraceContext | None,
        began_at: float,
        ended_at: float,
        problem: str = "",
    ) -> None:
        assert self._tracing is not None, "it is traced"
        self._tracing.record(
            name,
            own,
            None if parent is None else parent.span_id,
            began_at,
            ended_at,
            error=problem,
            attributes={"kvrelay.request_id": self._request_id, "kvrelay.attempt": self._attempt_number},
        )
