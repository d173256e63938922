"""A worker's session with itself: VllmEngine gives it jobs as a gateway would, without a stream."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvrelay.errors import CancelledRequestError
from kvrelay.worker.gateway_sessions import GatewaySessions

LOCAL_GATEWAY_ID = "vllm-engine"


class LocalSession:
    """Takes what a gateway would be sent about one request."""

    def __init__(self) -> None:
        self.gateway_id = LOCAL_GATEWAY_ID
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        """Names and values. Bounded by the request's tokens."""

    def send(self, **message: Any) -> None:
        for event in message.items():
            self.events.put_nowait(event)


class LocalSessions:
    def __init__(self, sessions: GatewaySessions) -> None:
        self._sessions = sessions
        self._by_request: dict[str, list[LocalSession]] = {}
        """By the client's request id, which two clients may share."""

    @property
    def num_open(self) -> int:
        return sum(map(len, self._by_request.values()))

    @contextmanager
    def open(self, request_id: str) -> Iterator[LocalSession]:
        """Leaving cancels the request's jobs."""
        session = LocalSession()
        sessions = self._by_request.setdefault(request_id, [])
        sessions.append(session)
        try:
            yield session
        finally:
            self._sessions.end_jobs_of(session)
            sessions.remove(session)
            if not sessions:
                del self._by_request[request_id]

    def abort(self, request_id: str) -> None:
        for session in self._by_request.get(request_id, ()):
            session.send(failed=CancelledRequestError("the request was aborted"))
