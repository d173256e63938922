"""All sessions of a worker and their jobs, on its event loop. A session's end ends its jobs."""

from __future__ import annotations  # gRPC's classes are generic for type checkers only

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import grpc
import structlog

from kvrelay.core.job import CacheChanges, FailureKind, Job, JobId, WorkerLoad
from kvrelay.core.job_validation import check_num_tokens, validate_job
from kvrelay.core.model_spec import ModelSpec
from kvrelay.errors import InvalidRequestError, OverloadedError, UnavailableError
from kvrelay.kv_cache.cache_feed import CacheFeed
from kvrelay.security.cluster_key import ProveWorker, prove_nothing
from kvrelay.v1 import decode_pb2, prefill_pb2, session_pb2
from kvrelay.wire.convert import failure_kind_to_pb, job_from_pb, job_id_from_pb, job_id_to_pb, load_to_pb
from kvrelay.worker.gateway_session import EventSink, GatewaySession
from kvrelay.worker.job_leases import Claim, JobLeases
from kvrelay.worker.ownership import OwnerLookup, OwnershipChecks

DRAINING_MESSAGE = "the worker is shutting down"
DEADLINE_MESSAGE = "the deadline passed"
SUPERSEDED_MESSAGE = "this attempt, or a newer one, is known already"
FOREIGN_MESSAGE = "the request belongs to another gateway"
TAKEN_OVER_MESSAGE = "a newer attempt took the job's place"
UNPROVEN_MESSAGE = "another gateway had the request, and Redis does not say that it is this gateway's now"

MAX_SESSIONS = 256
MAX_JOBS_PER_SESSION = 4096

# Time to write events to other gateways after the last jobs ended.
FLUSH_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


class GatewaySessions:
    """Owns the sessions and the leases.

    Args:
        cancel: called after the lease of an unwanted job ended.
        fail: called when a job must fail; `report_failure` ends its lease.
        owners: knows whose requests are. Without it no gateway takes another's over while jobs run.
    """

    def __init__(
        self,
        hello: session_pb2.WorkerHello,
        response_type: Callable[..., Any],
        model: ModelSpec,
        cancel: Callable[[JobId], None],
        fail: Callable[[JobId, FailureKind, str], None],
        owners: OwnerLookup | None = None,
        prove: ProveWorker = prove_nothing,
    ) -> None:
        self._hello = hello
        self._response_type = response_type
        self._model = model
        self._prove_worker = prove
        self._cancel = cancel
        self._fail = fail
        self._sessions: dict[GatewaySession, None] = {}
        """Ordered by begin, so that simulated runs repeat exactly."""
        self._num_calls = 0
        """With those that have not greeted yet."""
        self._load = WorkerLoad()
        self._informed: set[EventSink] = set()
        """Sessions that already got the current load."""
        self._cached: dict[bytes, None] = {}
        """Hashes of prefixes in the cache."""
        self._draining = False
        self._drained = asyncio.Event()
        self._kv_transfer_bytes = 0
        self.num_lost = 0
        self.num_jobs = 0
        self.failures: Counter[FailureKind] = Counter(dict.fromkeys(FailureKind, 0))
        self.leases: JobLeases[EventSink] = JobLeases(self._expire, self._on_superseded)
        self._ownership = OwnershipChecks(owners)

    @property
    def load(self) -> WorkerLoad:
        return replace(self._load, draining=self._draining, kv_transfer_bytes=self._kv_transfer_bytes)

    @property
    def is_idle(self) -> bool:
        return self._load.num_running == self._load.num_waiting == 0

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def draining(self) -> bool:
        return self._draining

    async def serve(
        self, context: grpc.aio.ServicerContext[Any, Any], on_command: Callable[[GatewaySession, str, Any], None]
    ) -> None:
        """Raises OverloadedError where MAX_SESSIONS are open, and as `GatewaySession`."""
        if self._num_calls >= MAX_SESSIONS:
            raise OverloadedError(f"the worker has {MAX_SESSIONS} sessions already; end others first")
        self._num_calls += 1
        try:
            await self._serve(GatewaySession(context, self._hello, self._make_response, on_command, self._prove_worker))
        finally:
            self._num_calls -= 1

    async def _serve(self, session: GatewaySession) -> None:
        await session.handshake()
        self._sessions[session] = None
        if session.wants_cache_changes:
            session.cache_feed = CacheFeed(self._cached)
        _log.info("session begins", gateway=session.gateway_id)
        try:
            await session.serve(self._drained)
        except UnavailableError as error:
            self.num_lost += 1
            _log.warning("session lost", gateway=session.gateway_id, reason=error.message)
            raise
        finally:
            self._sessions.pop(session, None)
            num_jobs = self.end_jobs_of(session)
            _log.info("session ended", gateway=session.gateway_id, num_jobs=num_jobs)

    def end_jobs_of(self, session: EventSink) -> int:
        """Returns the number of cancelled jobs."""
        self._informed.discard(session)
        self._ownership.cancel_all(session)
        jobs = self.leases.end_session(session)
        for job_id in jobs:
            self._cancel(job_id)
        return len(jobs)

    def admit(
        self,
        session: EventSink,
        message: decode_pb2.Reserve | prefill_pb2.StartPrefill,
        start: Callable[[Job], None],
    ) -> None:
        """Takes a job on and calls `start`, perhaps after a question to Redis; or refuses it."""
        job_id = job_id_from_pb(message.job_id)
        try:
            check_num_tokens(len(message.token_ids), self._model)
            job = replace(job_from_pb(message), holder=id(session))
            validate_job(job, self._model)
        except InvalidRequestError as error:
            self.refuse(session, job_id, FailureKind.INVALID, str(error))
            return
        self._begin(session, job, start)

    def _begin(self, session: EventSink, job: Job, start: Callable[[Job], None], *, owns_request: bool = False) -> None:
        job_id = job.job_id
        if self._draining:
            self.refuse(session, job_id, FailureKind.DRAINING, DRAINING_MESSAGE)
            return
        if job.deadline_ms == 0:
            self.refuse(session, job_id, FailureKind.DEADLINE, DEADLINE_MESSAGE)
            return
        if self.leases.num_jobs_of(session) >= MAX_JOBS_PER_SESSION:
            problem = f"the session has {MAX_JOBS_PER_SESSION} jobs already"
            self.refuse(session, job_id, FailureKind.OUT_OF_CAPACITY, problem)
            return
        match self.leases.begin(job_id, session, session.gateway_id, job.deadline_ms, owns_request=owns_request):
            case Claim.BEGUN:
                self.num_jobs += 1
                start(job)
            case Claim.UNPROVEN if not self._ownership.is_asked(session, job_id):
                self._prove(session, job, start)
            case _:
                self.refuse(session, job_id, FailureKind.SUPERSEDED, SUPERSEDED_MESSAGE)

    def _prove(self, session: EventSink, job: Job, start: Callable[[Job], None]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + job.deadline_ms / 1000

        def on_answer(is_owner: bool | None) -> None:
            if is_owner:
                left_ms = max(0, int((deadline - loop.time()) * 1000))
                self._begin(session, replace(job, deadline_ms=left_ms), start, owns_request=True)
            elif is_owner is None:
                self.refuse(session, job.job_id, FailureKind.UNPROVEN, UNPROVEN_MESSAGE)
            else:
                self.refuse(session, job.job_id, FailureKind.SUPERSEDED, FOREIGN_MESSAGE)

        self._ownership.ask(session, session.gateway_id, job, on_answer)

    def refuse(self, session: EventSink, job_id: JobId, kind: FailureKind, message: str) -> None:
        """For a job without a lease."""
        self.failures[kind] += 1
        self.send_to(session, job_failed=_failed_to_pb(job_id, kind, message))

    def cancel(self, session: EventSink, job_id: JobId) -> None:
        """Ignores jobs of other sessions."""
        self._ownership.cancel(session, job_id)
        if self.leases.session_of(job_id) is session:
            self.leases.release(job_id)
            self._cancel(job_id)

    def send(self, job_id: JobId, **message: Any) -> None:
        """Dropped if the job has ended."""
        session = self.leases.session_of(job_id)
        if session is not None:
            self.send_to(session, **message)

    def send_to(self, session: EventSink, **message: Any) -> None:
        """Sends an event, or the load alone."""
        session.send(**message)
        self._informed.add(session)

    def report_failure(self, job_id: JobId, kind: FailureKind, message: str) -> None:
        """Also ends the lease."""
        self.failures[kind] += 1
        self.send(job_id, job_failed=_failed_to_pb(job_id, kind, message))
        self.leases.end(job_id)

    def add_kv_bytes(self, kv_bytes: int) -> None:
        self._kv_transfer_bytes += kv_bytes

    def update_load(self, load: WorkerLoad) -> None:
        """Every later event carries the load."""
        self._load = load
        self._informed.clear()

    def update_cache(self, changes: CacheChanges) -> None:
        """They travel with later events."""
        for prefix in changes.evicted:
            self._cached.pop(prefix, None)
        self._cached.update(dict.fromkeys(changes.published))
        for session in self._sessions:
            if session.cache_feed is not None:
                session.cache_feed.add(changes)

    def broadcast_load(self) -> None:
        for session in self._sessions:
            if session not in self._informed:
                self.send_to(session)

    async def drain(self, timeout_ms: int) -> None:
        """Refuses new jobs, waits for running ones, fails the rest, and ends all sessions."""
        self._draining = True
        self._informed.clear()
        self.broadcast_load()
        _log.info("draining", num_jobs=len(self.leases), timeout_ms=timeout_ms)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_ms / 1000):
                await self.leases.wait_until_empty()
        for job_id in self.leases.jobs():
            self._fail(job_id, FailureKind.DRAINING, DRAINING_MESSAGE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self.leases.wait_until_empty()
                await self._flush(self._sessions)
        self._drained.set()

    @staticmethod
    async def _flush(sessions: Iterable[GatewaySession]) -> None:
        await asyncio.gather(*(session.wait_until_sent() for session in sessions))

    def _expire(self, job_id: JobId) -> None:
        self._fail(job_id, FailureKind.DEADLINE, DEADLINE_MESSAGE)

    def _on_superseded(self, job_id: JobId, session: EventSink | None) -> None:
        """Tells the session that had the job: its gateway tries again, or learns of its successor."""
        if session is not None:
            self.refuse(session, job_id, FailureKind.SUPERSEDED, TAKEN_OVER_MESSAGE)
        self._cancel(job_id)

    def _make_response(self, **message: Any) -> Any:
        return self._response_type(load=load_to_pb(self.load), **message)


def _failed_to_pb(job_id: JobId, kind: FailureKind, message: str) -> session_pb2.JobFailed:
    return session_pb2.JobFailed(job_id=job_id_to_pb(job_id), kind=failure_kind_to_pb(kind), message=message)
