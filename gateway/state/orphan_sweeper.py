"""Ends requests of dead gateways that no gateway will continue.

A gateway is dead after one lease time without a lease: leases that Redis lost are back by then.
Resumable requests wait for a takeover until their deadline. Ends are compare-and-set, because
several gateways sweep.
"""

import asyncio
from collections.abc import Callable, Iterable

import structlog

from kvrelay.core.request_state import ACTIVE_STATES, RequestState
from kvrelay.core.trace_context import log_fields
from kvrelay.errors import DeadlineError, KvrelayError, UnavailableError
from kvrelay.state.request_record import RequestSummary
from kvrelay.state.state_store import StateStore

LOOK_INTERVAL_S = 0.5
PAGE_SIZE = 100

_log = structlog.get_logger(__name__)


class OrphanSweeper:
    def __init__(
        self, store: StateStore, gateway_id: str, gateway_ids: Callable[[], Iterable[str]], lease_ms: int
    ) -> None:
        self._store = store
        self._gateway_id = gateway_id
        self._gateway_ids = gateway_ids
        self._lease_s = lease_ms / 1000
        self._last_seen: dict[str, float] = {}
        self._last_look = 0.0
        self._began_at = 0.0
        self._expires_at: dict[str, float] = {}
        """Deadlines of resumable orphans."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        due: float | None = self._began_at + self._lease_s
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self._store.health.wait_until_healthy()
            now = loop.time()
            if self._update_alive(now):
                due = now + self._lease_s
            try:
                if due is not None and now >= due:
                    due = None if await self.sweep() else now + self._lease_s
                for request_id in [request_id for request_id, at in self._expires_at.items() if now >= at]:
                    await self._look_again(request_id)
            except KvrelayError as error:
                _log.warning("dead gateways' requests cannot be swept now", reason=error.message)
                due = now + self._lease_s
            except Exception:
                _log.exception("a sweep failed")
                due = now + self._lease_s

    def _update_alive(self, now: float) -> bool:
        """Returns whether a gateway has left."""
        alive = set(self._gateway_ids())
        has_gone = any(
            self._last_seen.get(gateway_id) == self._last_look for gateway_id in self._last_seen.keys() - alive
        )
        self._last_seen |= dict.fromkeys(alive, now)
        self._last_look = now
        return has_gone

    def _is_dead(self, gateway_id: str) -> bool:
        if gateway_id == self._gateway_id or gateway_id in set(self._gateway_ids()):
            return False
        return asyncio.get_running_loop().time() - self._last_seen.get(gateway_id, self._began_at) >= self._lease_s

    async def sweep(self) -> bool:
        """Returns False while some owner is not away for long enough."""
        token, is_done = "", True
        while True:
            page = await self._store.list_requests(PAGE_SIZE, token, active_only=True)
            for summary in page.requests:
                if self._is_dead(summary.gateway_id):
                    await self._end(summary)
                elif summary.gateway_id != self._gateway_id and summary.gateway_id not in set(self._gateway_ids()):
                    is_done = False
            token = page.next_page_token
            if not token:
                return is_done
            await asyncio.sleep(0)

    async def _look_again(self, request_id: str) -> None:
        del self._expires_at[request_id]
        record = await self._store.get(request_id)
        if record is not None and record.state in ACTIVE_STATES and self._is_dead(record.gateway_id):
            await self._end(record)

    async def _end(self, summary: RequestSummary) -> None:
        record = await self._store.get(summary.request_id)
        if record is None or record.state not in ACTIVE_STATES:
            return
        error: KvrelayError
        if record.remaining_ms == 0:
            state, error = (
                RequestState.EXPIRED,
                DeadlineError("the request's deadline passed after its gateway had died"),
            )
        elif record.resumable:
            self._expires_at[record.request_id] = asyncio.get_running_loop().time() + record.remaining_ms / 1000
            return
        else:
            state, error = (
                RequestState.FAILED,
                UnavailableError("the gateway that ran the request has died; send it again"),
            )
        fields = {"error_message": error.message, "error_reason": error.reason}
        if await self._store.transition(
            record.request_id, record.attempt, state, fields=fields, owner=record.gateway_id
        ):
            about = log_fields(record.request_id, record.attempt, None)
            _log.info("ended a dead gateway's request", gateway=record.gateway_id, state=state.value, **about)
