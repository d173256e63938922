"""Keeps a session with every known worker.

A worker that restarts gets a new worker id.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from gateway.lifecycle import events
from gateway.routing.circuit_breaker import PairCircuitBreaker
from gateway.routing.conditional_disaggregation import predict
from gateway.routing.retry_budget import RetryBudget
from gateway.routing.router import Assignment, RouteQuery, WorkerView
from gateway.routing.routing import Routing
from gateway.workers import session_messages
from gateway.workers.session import SessionSettings, UntrustedWorkerError, WorkerSession
from gateway.workers.session_messages import Command, SessionResponse
from gateway.workers.worker_trust import WorkerTrust
from kvrelay.core.backoff import Backoff
from kvrelay.core.job import FailureKind, JobId
from kvrelay.core.member import Member, MemberRole
from kvrelay.errors import InvalidRequestError, UnavailableError
from kvrelay.network.rpc import create_channel
from kvrelay.security.credentials import ChannelCredentials, Towards, in_plain_text
from kvrelay.security.principal import Role
from kvrelay.wire.convert import cache_changes_from_pb

FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 1.0
LOG_INTERVAL_S = 60.0
"""Time between log lines about one unreachable worker."""
DEATH_CONFIRMATION_TIMEOUT_S = 1.0
"""Time for a broken session's worker to prove that it is alive."""
CREDENTIALS_INTERVAL_S = 1.0
_ADVICE = "it registered this address; if it is reached by another from here, give it --advertise-address host:port"

_log = structlog.get_logger(__name__)
_Endpoint = tuple[MemberRole, str]


class WorkerSessions:
    """No callback may raise.

    Args:
        on_event: gets (request id, event).
        on_lost: gets a worker's id and whether it seems dead.
        on_death_confirmed: gets the id and whether it really died.
        on_room: gets how many more requests workers may get.
        towards: a session moves to a new channel when these credentials change.
        trust: says which workers get sessions.
    """

    def __init__(
        self,
        settings: SessionSettings,
        on_event: Callable[[str, events.Event], None],
        on_lost: Callable[[str, bool], None],
        on_death_confirmed: Callable[[str, bool], None],
        on_change: Callable[[], None],
        on_room: Callable[[int], None] = lambda num_requests: None,
        towards: Towards = in_plain_text,
        trust: WorkerTrust | None = None,
        routing: Routing | None = None,
    ) -> None:
        self.routing = routing or Routing("load", random.random)
        self._towards = towards
        self._trust = trust or WorkerTrust()
        # Replaced at every change: each reader waits for the one after what it saw.
        self._members_changed = asyncio.Event()
        self._settings = replace(settings, wants_cache_changes=self.routing.wants_cache_changes)
        self._on_event = on_event
        self._on_lost = on_lost
        self._on_death_confirmed = on_death_confirmed
        self._on_change = on_change
        self._on_room = on_room
        self.retry_budget = RetryBudget(asyncio.get_running_loop().time())
        self._tasks: dict[_Endpoint, asyncio.Task[None]] = {}
        self._wanted: set[_Endpoint] = set()
        self._sessions: dict[str, WorkerSession] = {}
        self.num_lost: Counter[tuple[MemberRole, bool]] = Counter()
        """By role and whether the stream broke."""
        self.num_placed: Counter[MemberRole] = Counter()
        """Prompts with a choice, by the chosen worker's role."""
        self._reached: set[_Endpoint] = set()
        self._problems: dict[_Endpoint, str] = {}
        self._unnamed: dict[_Endpoint, str] = {}
        self._next_log_times: dict[_Endpoint, float] = {}
        self._pair_breaker = PairCircuitBreaker(random.random)
        self._unconfirmed_deaths: dict[_Endpoint, tuple[str, asyncio.TimerHandle]] = {}
        """Worker id and timeout."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self._wanted.clear()
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def set_members(self, members: tuple[Member, ...]) -> None:
        """A session outlives its worker's lease."""
        self._trust.set_members(members)
        changed, self._members_changed = self._members_changed, asyncio.Event()
        changed.set()
        self._wanted = {(member.role, member.address) for member in members if member.role is not MemberRole.GATEWAY}
        for endpoint in self._wanted - self._tasks.keys():
            self._tasks[endpoint] = asyncio.create_task(
                self._keep_connected(endpoint), name=f"{endpoint[0].value} worker {endpoint[1]}"
            )
        connected = {(session.role, session.address) for session in self._sessions.values()}
        for endpoint in self._tasks.keys() - self._wanted - connected:
            self._tasks.pop(endpoint).cancel()

    # --- what the gateway knows -------------------------------------------------------------------

    def sessions(self) -> list[WorkerSession]:
        """Sorted by role and worker id."""
        return sorted(self._sessions.values(), key=lambda session: (session.role.value, session.worker_id))

    def views(self) -> list[WorkerView]:
        return [session.view() for session in self._sessions.values()]

    def problem(self, role: MemberRole, address: str) -> str:
        """Why the worker has no session; empty while it has one."""
        return self._problems.get((role, address), "")

    def has_decode_worker(self, fingerprint: str) -> bool:
        sessions = (session for session in self._sessions.values() if session.role is MemberRole.DECODE)
        return any(session.identity.model.fingerprint == fingerprint for session in sessions)

    def choose(self, query: RouteQuery, request_id: str) -> Assignment | None:
        """The chosen workers count as busier from now on."""
        now = asyncio.get_running_loop().time()
        self.forget(request_id)  # its earlier attempt
        unready = {session.worker_id for session in self._sessions.values() if not session.circuit_breaker.allows(now)}
        if unready:
            query = replace(query, excluded_worker_ids=query.excluded_worker_ids | unready)
        assignment = self.routing.choose(self.views(), query, request_id)
        if assignment is None:
            return None
        chosen = (assignment.decode_worker_id, assignment.prefill_worker_id)
        for session in (self._sessions[worker_id] for worker_id in chosen if worker_id is not None):
            session.count_assigned(query.num_tokens)
            session.circuit_breaker.start(request_id)
        if assignment.prefill_worker_id is not None:
            self._pair_breaker.on_use((assignment.decode_worker_id, assignment.prefill_worker_id), now)
        return assignment

    def forget(self, request_id: str) -> None:
        self.routing.hits.forget(request_id)
        for session in self._sessions.values():
            session.circuit_breaker.release(request_id)

    def should_prefill_locally(
        self, job_id: JobId, decode_worker_id: str, prefill_worker_id: str, num_uncached_tokens: int
    ) -> bool:
        """The prompt counts in the chosen worker's load from now on."""
        decode, prefill = self._sessions.get(decode_worker_id), self._sessions.get(prefill_worker_id)
        if decode is None or prefill is None:
            return False
        handoff = prefill.handoff_costs.to(decode_worker_id, asyncio.get_running_loop().time())
        prediction = predict(num_uncached_tokens, decode.expected_load(), prefill.expected_load(), handoff)
        session = decode if prediction.is_local else prefill
        self.num_placed[session.role] += 1
        session.in_flight_prompts.add(job_id, num_uncached_tokens, session.load)
        if not prediction.is_local:
            prefill.handoff_costs.begin(job_id, decode_worker_id, num_uncached_tokens)
        return prediction.is_local

    def avoid_pair(self, pair: tuple[str, str]) -> None:
        """A transfer over (decode, prefill) failed."""
        self._pair_breaker.on_failure(pair, asyncio.get_running_loop().time())

    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        return self._pair_breaker.open_pairs(asyncio.get_running_loop().time())

    # --- commands ---------------------------------------------------------------------------------

    def send(self, action: Command, fingerprint: str) -> bool:
        """Returns False without a session: the worker then holds nothing of the job."""
        session = self._sessions.get(action.worker_id)
        if session is None:
            return False
        if isinstance(action, events.SendCancel):
            session.in_flight_prompts.remove(action.job_id)
            session.handoff_costs.discard(action.job_id)
        session.send(session_messages.command(session.role, action, fingerprint))
        return True

    # --- sessions ---------------------------------------------------------------------------------

    async def _keep_connected(self, endpoint: _Endpoint) -> None:
        role, address = endpoint
        backoff = Backoff(FIRST_RECONNECT_S, LONGEST_RECONNECT_S, random.random)
        try:
            while endpoint in self._wanted:
                credentials = self._towards(Role(role.value))
                async with create_channel(address, credentials=credentials) as channel:
                    while endpoint in self._wanted and self._towards(Role(role.value)) == credentials:
                        session = WorkerSession(role, address, channel, self._settings, self._dispatch, credentials)
                        async with self._moving(session, credentials):
                            if await self._run_session(session):
                                backoff.reset()
                        await self._pause(endpoint, backoff.next_delay_s())
        finally:
            self._resolve_death(endpoint, None)
            # no newer task keeps the endpoint
            if self._tasks.get(endpoint, task := asyncio.current_task()) is task:
                self._tasks.pop(endpoint, None)
                self._reached.discard(endpoint)
                self._problems.pop(endpoint, None)
                self._unnamed.pop(endpoint, None)
                self._next_log_times.pop(endpoint, None)

    async def _pause(self, endpoint: _Endpoint, delay_s: float) -> None:
        """Ends when the registry names a worker that was refused."""
        changed = self._members_changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                while endpoint not in self._unnamed or not self._trust.is_named(*endpoint, self._unnamed[endpoint]):
                    await changed.wait()
                    changed = self._members_changed

    @asynccontextmanager
    async def _moving(self, session: WorkerSession, credentials: ChannelCredentials | None) -> AsyncIterator[None]:
        """Ends the session once its credentials are old: when the worker is idle, or late."""
        moving = None
        if credentials is not None and credentials.tls is not None:
            watching = self._end_when_changed(session, credentials)
            moving = asyncio.create_task(watching, name=f"credentials towards {session.address}")
        try:
            yield
        finally:
            if moving is not None:
                moving.cancel()

    async def _end_when_changed(self, session: WorkerSession, credentials: ChannelCredentials) -> None:
        while self._towards(Role(session.role.value)) == credentials:  # noqa: ASYNC110 - files set no event
            await asyncio.sleep(CREDENTIALS_INTERVAL_S)
        # Not all sessions at once: each one's jobs are computed again.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.5, 1.0) * self._settings.move_ms / 1000):
                while not session.is_idle:  # noqa: ASYNC110 - the load comes with each message
                    await asyncio.sleep(CREDENTIALS_INTERVAL_S)
        session.end("the certificates have changed")

    async def _run_session(self, session: WorkerSession) -> bool:
        """Returns whether the worker answered the handshake."""
        has_answered = False
        endpoint = (session.role, session.address)

        def on_connected(connected: WorkerSession) -> None:
            nonlocal has_answered
            self._resolve_death(endpoint, connected.worker_id)
            self._check_trust(connected)
            has_answered = True
            self._add(connected)

        try:
            reason = await session.run(on_connected)
            self._problems[endpoint] = f"the session with it ended: {reason}"
            _log.info("session with worker ended", worker_id=session.worker_id, address=session.address, reason=reason)
        except UntrustedWorkerError as refusal:
            self._problems[endpoint] = str(refusal)
            if self._may_log(endpoint):
                _log.warning("worker is refused", role=session.role.value, address=session.address, reason=str(refusal))
            self._resolve_death(endpoint, None)
        except UnavailableError as failure:
            self._problems[endpoint] = failure.message if endpoint in self._reached else f"{failure.message}; {_ADVICE}"
            if self._may_log(endpoint):
                self._log_unreachable(endpoint, failure.message)
            self._resolve_death(endpoint, None)
        except Exception as failure:
            self._problems[endpoint] = (
                f"the session with it failed: {type(failure).__name__}; the gateway's log has more"
            )
            _log.exception("session with worker failed", address=session.address)
        finally:
            if has_answered:
                self._remove(session)
        return has_answered

    def _check_trust(self, session: WorkerSession) -> None:
        endpoint, worker_id = (session.role, session.address), session.worker_id
        self._unnamed.pop(endpoint, None)
        problem = self._trust.problem_with(*endpoint, worker_id, session.identity.model)
        if problem is not None:
            if not self._trust.is_named(*endpoint, worker_id):
                self._unnamed[endpoint] = worker_id
            raise UntrustedWorkerError(problem)

    def _may_log(self, endpoint: _Endpoint) -> bool:
        now = asyncio.get_running_loop().time()
        if now < self._next_log_times.get(endpoint, now):
            return False
        self._next_log_times[endpoint] = now + LOG_INTERVAL_S
        return True

    def _log_unreachable(self, endpoint: _Endpoint, reason: str) -> None:
        role, address = endpoint
        if endpoint in self._reached:
            _log.info("worker cannot be reached", role=role.value, address=address, reason=reason)
            return
        _log.warning("worker cannot be reached", role=role.value, address=address, reason=reason, advice=_ADVICE)

    def _add(self, session: WorkerSession) -> None:
        endpoint = (session.role, session.address)
        self._reached.add(endpoint)
        self._next_log_times.pop(endpoint, None)
        self._problems.pop(endpoint, None)
        previous = self._sessions.get(session.worker_id)
        if previous is not None:  # the same worker under another address
            self._on_lost(session.worker_id, False)
        self._sessions[session.worker_id] = session
        _log.info(
            "session with worker began", worker_id=session.worker_id, role=session.role.value, address=session.address
        )
        self._on_change()

    def _remove(self, session: WorkerSession) -> None:
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
            self.num_lost[session.role, session.died] += 1
            self.routing.on_worker_lost(session.worker_id)
            self._on_lost(session.worker_id, session.died)
            if session.died:
                self._suspect_death((session.role, session.address), session.worker_id)

    def _suspect_death(self, endpoint: _Endpoint, worker_id: str) -> None:
        self._resolve_death(endpoint, None)
        timer = asyncio.get_running_loop().call_later(DEATH_CONFIRMATION_TIMEOUT_S, self._resolve_death, endpoint, None)
        self._unconfirmed_deaths[endpoint] = (worker_id, timer)

    def _resolve_death(self, endpoint: _Endpoint, found_worker_id: str | None) -> None:
        """The worker is alive if the same one answers."""
        worker_id, timer = self._unconfirmed_deaths.pop(endpoint, (None, None))
        if worker_id is not None and timer is not None:
            timer.cancel()
            self._on_death_confirmed(worker_id, found_worker_id != worker_id)

    def _dispatch(self, session: WorkerSession, response: SessionResponse) -> None:
        if self._sessions.get(session.worker_id) is not session:
            return
        if response.HasField("cache_changes"):
            self._learn_of_cache(session, response)
        for request_id, event in session_messages.to_events(session.worker_id, response):
            # the most frequent; says nothing of the worker
            if not isinstance(event, events.DecodeTokens):
                self._on_report(session, event)
            self._on_event(request_id, event)

    def _learn_of_cache(self, session: WorkerSession, response: SessionResponse) -> None:
        try:
            changes = cache_changes_from_pb(response.cache_changes)
        except InvalidRequestError as failure:
            session.end(f"it tells of its cache what cannot be read: {failure.message}")
        else:
            self.routing.on_cache_changes(session.worker_id, changes)

    def _on_report(self, session: WorkerSession, event: events.Event) -> None:
        if isinstance(event, events.JobFailed) and event.kind is FailureKind.DRAINING:
            session.mark_draining()
        if isinstance(event, events.TransferDone):
            now = asyncio.get_running_loop().time()
            session.handoff_costs.record(event.job_id, event.transfer_ms, event.exposed_ms, event.wire_ms, now)
        if isinstance(event, events.Reserved | events.PrefillDone):
            request_id = event.job_id.request_id
            self.routing.on_cached(request_id, session.role, session.worker_id, event.num_cached_tokens)
        if isinstance(event, events.PrefillDone | events.DecodeStarted | events.JobFailed):
            session.in_flight_prompts.remove(event.job_id)
            if isinstance(event, events.JobFailed):
                session.handoff_costs.discard(event.job_id)
            self._on_outcome(session, event)

    def _on_outcome(
        self, session: WorkerSession, event: events.PrefillDone | events.DecodeStarted | events.JobFailed
    ) -> None:
        request_id = event.job_id.request_id
        if not isinstance(event, events.JobFailed):
            num_more = session.circuit_breaker.on_success(request_id)
            if isinstance(event, events.DecodeStarted):
                self.forget(request_id)  # the prefill worker was chosen and is not needed
            if num_more:
                asyncio.get_running_loop().call_soon(self._on_room, num_more)
        elif event.kind is FailureKind.INTERNAL:
            session.circuit_breaker.on_failure(request_id, asyncio.get_running_loop().time())
