"""Sessions with all workers that are known: made, kept, made again. Owns who is connected; knows no request beyond its id.

A worker is the same only if its worker id is: after a restart at the same address it is another one.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from gateway import lifecycle_messages as m
from gateway import session_messages
from gateway.prompt_placement import is_sooner_on_decode_worker
from gateway.retry_budget import RetryBudget
from gateway.router import Assignment, FailedPairs, RouteQuery, WorkerView, choose_workers
from gateway.session_messages import Command, SessionResponse
from gateway.worker_session import SessionSettings, WorkerSession
from kvrelay.backoff import Backoff
from kvrelay.errors import UnavailableError
from kvrelay.rpc import create_channel
from kvrelay.work import FailureKind, WorkId
from kvrelay.worker_registry import Member, MemberRole

FIRST_RECONNECT_S = 0.05
LONGEST_RECONNECT_S = 1.0
LONGEST_DOUBT_S = 1.0
"""How long after its session broke a worker may be found to live."""

_log = structlog.get_logger(__name__)
_Place = tuple[MemberRole, str]
"""Role and address."""


class WorkerSessions:
    """All sessions of a gateway.

    Args:
        settings: of the gateway.
        on_event: called with (request id, event) for whatever a worker says about a request; must not raise.
        on_lost: called with a worker's id when its session ended, and whether its process seems to have died; must not raise.
        on_fate: called a moment after `on_lost` said that a worker seems to have died: its id and whether it has; must not raise.
        on_change: called when a worker was found, or may take work again; must not raise.
        on_room: called with the number of requests that a worker may be given more than before; must not raise.
    """

    def __init__(
        self,
        settings: SessionSettings,
        on_event: Callable[[str, m.Event], None],
        on_lost: Callable[[str, bool], None],
        on_fate: Callable[[str, bool], None],
        on_change: Callable[[], None],
        on_room: Callable[[int], None] = lambda num_requests: None,
    ) -> None:
        self._settings = settings
        self._on_event = on_event
        self._on_lost = on_lost
        self._on_fate = on_fate
        self._on_change = on_change
        self._on_room = on_room
        self.retries = RetryBudget(asyncio.get_running_loop().time())
        self._tasks: dict[_Place, asyncio.Task[None]] = {}
        self._wanted: set[_Place] = set()
        self._sessions: dict[str, WorkerSession] = {}
        self.num_lost: Counter[tuple[MemberRole, bool]] = Counter()
        """Sessions that ended, by the worker's role and whether their stream broke."""
        self._failed_pairs = FailedPairs()
        self._doubts: dict[_Place, tuple[str, asyncio.TimerHandle]] = {}
        """The worker whose session broke at a place, until it is known whether it lives, and when that is waited for no more."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Closes all sessions at the end."""
        try:
            yield
        finally:
            self._wanted.clear()
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def set_members(self, members: tuple[Member, ...]) -> None:
        """Makes sessions with new workers. Those that left are kept while their session lives."""
        self._wanted = {(member.role, member.address) for member in members if member.role is not MemberRole.GATEWAY}
        for place in self._wanted - self._tasks.keys():
            self._tasks[place] = asyncio.create_task(self._keep_connected(place), name=f"{place[0].value} worker {place[1]}")
        connected = {(session.role, session.address) for session in self._sessions.values()}
        for place in self._tasks.keys() - self._wanted - connected:
            self._tasks.pop(place).cancel()

    # --- what is known --------------------------------------------------------------------------------------------------------

    def sessions(self) -> list[WorkerSession]:
        """All that are up, by role and worker id."""
        return sorted(self._sessions.values(), key=lambda session: (session.role.value, session.worker_id))

    def views(self) -> list[WorkerView]:
        """What the router needs to know of the connected workers."""
        return [session.view() for session in self._sessions.values()]

    def has_decode_worker(self, fingerprint: str) -> bool:
        """Whether any decode worker of the model is connected, busy or not."""
        sessions = (session for session in self._sessions.values() if session.role is MemberRole.DECODE)
        return any(session.identity.model.fingerprint == fingerprint for session in sessions)

    def choose(self, query: RouteQuery, request_id: str) -> Assignment | None:
        """Workers for a work; they count as busier from now on.

        Args:
            query: what is to be placed.
            request_id: whose work it is.
        """
        now = asyncio.get_running_loop().time()
        self._end_intake(request_id)  # of an earlier attempt
        unready = {session.worker_id for session in self._sessions.values() if not session.intake.may_take(now)}
        if unready:
            query = replace(query, excluded_worker_ids=query.excluded_worker_ids | unready)
        assignment = choose_workers(self.views(), query)
        if assignment is None:
            return None
        chosen = (assignment.decode_worker_id, assignment.prefill_worker_id)
        for session in (self._sessions[worker_id] for worker_id in chosen if worker_id is not None):
            session.note_assigned(query.num_tokens)
            session.intake.begin(request_id)
        if assignment.prefill_worker_id is not None:
            self._failed_pairs.note_used((assignment.decode_worker_id, assignment.prefill_worker_id), now)
        return assignment

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._end_intake(request_id)

    def _end_intake(self, request_id: str) -> None:
        for session in self._sessions.values():
            session.intake.end(request_id)

    def place_prompt(self, work_id: WorkId, decode_worker_id: str, prefill_worker_id: str, num_uncached_tokens: int) -> bool:
        """Whether a prompt stays on the decode worker that reserved blocks for it, by their loads; it counts from now on."""
        decode, prefill = self._sessions.get(decode_worker_id), self._sessions.get(prefill_worker_id)
        if decode is None or prefill is None:
            return False
        is_local = is_sooner_on_decode_worker(
            num_uncached_tokens, decode.sent_prompts.expected_load(decode.load), prefill.sent_prompts.expected_load(prefill.load)
        )
        session = decode if is_local else prefill
        session.sent_prompts.add(work_id, num_uncached_tokens, session.load)
        return is_local

    def avoid_pair(self, pair: tuple[str, str]) -> None:
        """KV did not get from one to the other: leave (decode, prefill) alone for a while."""
        self._failed_pairs.note(pair, asyncio.get_running_loop().time())

    def avoided_pairs(self) -> frozenset[tuple[str, str]]:
        """(decode, prefill) workers to leave alone now."""
        return self._failed_pairs.current(asyncio.get_running_loop().time())

    # --- commands -------------------------------------------------------------------------------------------------------------

    def send(self, action: Command, fingerprint: str) -> bool:
        """Sends a command; False when there is no session with the worker, and so nothing that it could hold."""
        session = self._sessions.get(action.worker_id)
        if session is None:
            return False
        if isinstance(action, m.SendCancel):
            session.sent_prompts.remove(action.work_id)
        session.send(session_messages.command(session.role, action, fingerprint))
        return True

    # --- sessions -------------------------------------------------------------------------------------------------------------

    async def _keep_connected(self, place: _Place) -> None:
        """Makes a session again and again while the worker is wanted."""
        role, address = place
        backoff = Backoff(FIRST_RECONNECT_S, LONGEST_RECONNECT_S)
        try:
            async with create_channel(address) as channel:
                while place in self._wanted:
                    session = WorkerSession(role, address, channel, self._settings, self._dispatch)
                    if await self._run_session(session):
                        backoff.reset()
                    await asyncio.sleep(backoff.next_delay_s())
        finally:
            self._settle_doubt(place, None)
            if self._tasks.get(place) is asyncio.current_task():
                del self._tasks[place]

    async def _run_session(self, session: WorkerSession) -> bool:
        """Whether the session was up for a while."""
        greeted = False

        def on_greeted(greeted_session: WorkerSession) -> None:
            nonlocal greeted
            greeted = True
            self._settle_doubt((session.role, session.address), greeted_session.worker_id)
            self._add(greeted_session)

        try:
            reason = await session.run(on_greeted)
            _log.info("session with worker ended", worker_id=session.worker_id, address=session.address, reason=reason)
        except UnavailableError as failure:
            _log.debug("worker cannot be reached", address=session.address, reason=failure.message)
            self._settle_doubt((session.role, session.address), None)
        except Exception:
            _log.exception("session with worker failed", address=session.address)
        finally:
            if greeted:
                self._remove(session)
        return greeted

    def _add(self, session: WorkerSession) -> None:
        previous = self._sessions.get(session.worker_id)
        if previous is not None:  # the same worker under another address: the newer session counts
            self._on_lost(session.worker_id, False)
        self._sessions[session.worker_id] = session
        _log.info("session with worker began", worker_id=session.worker_id, role=session.role.value, address=session.address)
        self._on_change()

    def _remove(self, session: WorkerSession) -> None:
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
            self.num_lost[session.role, session.died] += 1
            self._on_lost(session.worker_id, session.died)
            if session.died:
                self._doubt((session.role, session.address), session.worker_id)

    def _doubt(self, place: _Place, worker_id: str) -> None:
        """The session broke; whether the worker has died too shows when the next one is made."""
        self._settle_doubt(place, None)
        timer = asyncio.get_running_loop().call_later(LONGEST_DOUBT_S, self._settle_doubt, place, None)
        self._doubts[place] = (worker_id, timer)

    def _settle_doubt(self, place: _Place, found_worker_id: str | None) -> None:
        """Somebody answers at the place, or nobody."""
        worker_id, timer = self._doubts.pop(place, (None, None))
        if worker_id is not None and timer is not None:
            timer.cancel()
            self._on_fate(worker_id, found_worker_id != worker_id)

    def _dispatch(self, session: WorkerSession, response: SessionResponse) -> None:
        if self._sessions.get(session.worker_id) is not session:
            return
        for request_id, event in session_messages.events(session.worker_id, response):
            if not isinstance(event, m.DecodeTokens):  # the most frequent by far say nothing about the worker
                self._note(session, event)
            self._on_event(request_id, event)

    def _note(self, session: WorkerSession, event: m.Event) -> None:
        """What an event says about the worker that sent it."""
        if isinstance(event, m.WorkFailed) and event.kind is FailureKind.DRAINING:
            session.mark_draining()
        if isinstance(event, m.PrefillDone | m.DecodeStarted | m.WorkFailed):
            session.sent_prompts.remove(event.work_id)
            self._note_outcome(session, event)

    def _note_outcome(self, session: WorkerSession, event: m.PrefillDone | m.DecodeStarted | m.WorkFailed) -> None:
        request_id = event.work_id.request_id
        if not isinstance(event, m.WorkFailed):
            num_more = session.intake.note_success(request_id)
            if isinstance(event, m.DecodeStarted):
                self._end_intake(request_id)  # a prefill worker that was chosen and not needed
            if num_more:
                asyncio.get_running_loop().call_soon(self._on_room, num_more)
        elif event.kind is FailureKind.INTERNAL:
            session.intake.note_failure(request_id, asyncio.get_running_loop().time())
