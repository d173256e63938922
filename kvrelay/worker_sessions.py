"""All sessions of a worker and the works that came over them: who is told what, and what ends when a session does.

Lives on the worker's event loop. Knows nothing of what works are made of; each worker's service does.
"""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import grpc
import structlog

from kvrelay.errors import InvalidRequestError, UnavailableError
from kvrelay.model_spec import ModelSpec
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire import failure_kind_to_pb, load_to_pb, work_from_pb, work_id_from_pb, work_id_to_pb
from kvrelay.work import FailureKind, Work, WorkerLoad, WorkId
from kvrelay.work_leases import WorkLeases
from kvrelay.work_rules import check_work
from kvrelay.worker_session import WorkerSession

DRAINING_MESSAGE = "the worker is shutting down"
DEADLINE_MESSAGE = "the deadline passed"

# A session that ends frees its works; their events find nobody. What was queued for others is written within this time.
FLUSH_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


class WorkerSessions:
    """Owns the sessions and the leases.

    Args:
        hello: who the worker is.
        response_type: message type of the service's session responses.
        model: the served model.
        give_up: called when a work is not wanted any more; its lease has ended.
        fail: called when a work is to end with a failure; its lease ends when that is reported.
    """

    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        response_type: Callable[..., Any],
        model: ModelSpec,
        give_up: Callable[[WorkId], None],
        fail: Callable[[WorkId, FailureKind, str], None],
    ) -> None:
        self._hello = hello
        self._response_type = response_type
        self._model = model
        self._give_up = give_up
        self._fail = fail
        self._sessions: dict[WorkerSession, None] = {}
        """In the order of their beginning: what goes to all goes in an order that does not change from run to run."""
        self._load = WorkerLoad()
        self._informed: set[WorkerSession] = set()
        """Those whose gateways have been sent something since the load changed, and so the load too."""
        self._draining = False
        self._drained = asyncio.Event()
        self._kv_transfer_bytes = 0
        self.num_lost = 0
        """Sessions whose gateway fell silent, or did not read."""
        self.num_works = 0
        """Works that were taken on."""
        self.failures: Counter[FailureKind] = Counter(dict.fromkeys(FailureKind, 0))
        """Works that failed or were refused."""
        self.leases: WorkLeases[WorkerSession] = WorkLeases(self._expire, give_up)

    @property
    def load(self) -> WorkerLoad:
        """As of the engine's last report."""
        return replace(self._load, draining=self._draining, kv_transfer_bytes=self._kv_transfer_bytes)

    @property
    def is_idle(self) -> bool:
        """Whether the engine had nothing to compute, as of its last report."""
        return self._load.num_running == self._load.num_waiting == 0

    @property
    def num_sessions(self) -> int:
        """Gateways that are connected."""
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        return self._draining

    async def serve(
        self, context: grpc.aio.ServicerContext[Any, Any], on_command: Callable[[WorkerSession, str, Any], None]
    ) -> None:
        """Serves one session, and gives up its works when it ends."""
        session = WorkerSession(context, self._hello, self._make_response, on_command)
        await session.greet()
        self._sessions[session] = None
        _log.info("session begins", gateway=session.gateway_id)
        try:
            await session.serve(self._drained)
        except UnavailableError as error:
            self.num_lost += 1
            _log.warning("session lost", gateway=session.gateway_id, reason=error.message)
            raise
        finally:
            self._sessions.pop(session, None)
            num_works = self.end_works_of(session)
            _log.info("session ended", gateway=session.gateway_id, num_works=num_works)

    def end_works_of(self, session: WorkerSession) -> int:
        """A session has ended: gives up all its works; how many these were."""
        self._informed.discard(session)
        works = self.leases.end_session(session)
        for work_id in works:
            self._give_up(work_id)
        return len(works)

    def admit(self, session: WorkerSession, message: decode_pb2.Reserve | prefill_pb2.StartPrefill) -> Work | None:
        """Takes a work on. None when it was refused, which the gateway has been told."""
        work_id = work_id_from_pb(message.work_id)
        try:
            work = work_from_pb(message)
            check_work(work, self._model)
        except (InvalidRequestError, UnicodeDecodeError) as error:
            self.refuse(session, work_id, FailureKind.INVALID, str(error))
            return None
        if self._draining:
            self.refuse(session, work_id, FailureKind.DRAINING, DRAINING_MESSAGE)
        elif work.deadline_ms == 0:
            self.refuse(session, work_id, FailureKind.DEADLINE, DEADLINE_MESSAGE)
        elif not self.leases.begin(work_id, session, work.deadline_ms):
            self.refuse(session, work_id, FailureKind.SUPERSEDED, "this attempt, or a newer one, is known already")
        else:
            self.num_works += 1
            return work
        return None

    def refuse(self, session: WorkerSession, work_id: WorkId, kind: FailureKind, message: str) -> None:
        """Tells a gateway that a work that has no lease failed."""
        self.failures[kind] += 1
        self.send_to(session, work_failed=_failed_to_pb(work_id, kind, message))

    def cancel(self, session: WorkerSession, work_id: WorkId) -> None:
        """The gateway gives a work of its own up."""
        if self.leases.session_of(work_id) is session:
            self.leases.end(work_id)
            self._give_up(work_id)

    def send(self, work_id: WorkId, **message: Any) -> None:
        """An event of a work, to its gateway; dropped when the work has been given up."""
        session = self.leases.session_of(work_id)
        if session is not None:
            self.send_to(session, **message)

    def send_to(self, session: WorkerSession, **message: Any) -> None:
        """Events to a gateway, and the load with them."""
        session.send(**message)
        self._informed.add(session)

    def report_failure(self, work_id: WorkId, kind: FailureKind, message: str) -> None:
        """A work has failed: tells its gateway and ends its lease."""
        self.failures[kind] += 1
        self.send(work_id, work_failed=_failed_to_pb(work_id, kind, message))
        self.leases.end(work_id)

    def add_kv_bytes(self, kv_bytes: int) -> None:
        """Counts payload that was transferred."""
        self._kv_transfer_bytes += kv_bytes

    def update_load(self, load: WorkerLoad) -> None:
        """The engine's load of now; rides on whatever is sent next."""
        self._load = load
        self._informed.clear()

    def broadcast_load(self) -> None:
        """Tells every gateway the load at once that has not heard of it since it changed."""
        for session in self._sessions:
            if session not in self._informed:
                self.send_to(session)

    async def drain(self, timeout_ms: int) -> None:
        """Takes no new work, lets running work end, fails what is left after the timeout, and ends all sessions."""
        self._draining = True
        self._informed.clear()
        self.broadcast_load()
        _log.info("draining", num_works=len(self.leases), timeout_ms=timeout_ms)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self.leases.wait_until_empty()
        for work_id in self.leases.works():
            self._fail(work_id, FailureKind.DRAINING, DRAINING_MESSAGE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self.leases.wait_until_empty()
                await self._flush(self._sessions)
        self._drained.set()

    @staticmethod
    async def _flush(sessions: Iterable[WorkerSession]) -> None:
        await asyncio.gather(*(session.wait_until_sent() for session in sessions))

    def _expire(self, work_id: WorkId) -> None:
        self._fail(work_id, FailureKind.DEADLINE, DEADLINE_MESSAGE)

    def _make_response(self, **message: Any) -> Any:
        return self._response_type(load=load_to_pb(self.load), **message)


def _failed_to_pb(work_id: WorkId, kind: FailureKind, message: str) -> session_pb2.WorkFailed:
    return session_pb2.WorkFailed(work_id=work_id_to_pb(work_id), kind=failure_kind_to_pb(kind), message=message)
