"""Asks Redis whose a request is, before one gateway ends another's jobs."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from kvrelay.core.job import Job, JobId
from kvrelay.errors import KvrelayError
from kvrelay.worker.gateway_session import EventSink

MAX_QUESTIONS = 64
QUESTION_TIMEOUT_S = 1.0

_log = structlog.get_logger(__name__)


class OwnerLookup(Protocol):
    async def owner_of(self, request_id: str) -> str | None:
        """A gateway id; None for an unknown request. Raises KvrelayError."""
        raise NotImplementedError


class OwnershipChecks:
    """Without a lookup nothing is ever proven."""

    def __init__(self, owners: OwnerLookup | None = None) -> None:
        self._owners = owners
        self._tasks: dict[tuple[EventSink, JobId], asyncio.Task[None]] = {}

    def is_asked(self, session: EventSink, job_id: JobId) -> bool:
        return (session, job_id) in self._tasks

    def ask(self, session: EventSink, gateway_id: str, job: Job, on_answer: Callable[[bool | None], None]) -> None:
        """`on_answer` gets whether the request is this gateway's; None if it is not known."""
        if self._owners is None or len(self._tasks) >= MAX_QUESTIONS:
            on_answer(None)
            return
        key = (session, job.job_id)
        asking = self._ask(self._owners, gateway_id, job.job_id, on_answer)
        self._tasks[key] = task = asyncio.create_task(asking, name=f"owner of {job.job_id.request_id}")
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def cancel(self, session: EventSink, job_id: JobId) -> None:
        if task := self._tasks.get((session, job_id)):
            task.cancel()

    def cancel_all(self, session: EventSink) -> None:
        for (asking, _), task in self._tasks.items():
            if asking is session:
                task.cancel()

    async def _ask(
        self, owners: OwnerLookup, gateway_id: str, job_id: JobId, on_answer: Callable[[bool | None], None]
    ) -> None:
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT_S):
                owner = await owners.owner_of(job_id.request_id)
        except (KvrelayError, TimeoutError) as error:
            _log.info("the owner of a request is not known", request_id=job_id.request_id, reason=str(error))
            owner = None
        on_answer(None if owner is None else owner == gateway_id)
