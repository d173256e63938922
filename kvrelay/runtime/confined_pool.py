"""A few confined children of one kind, started when needed, and a bounded line before them.

ask --a child is idle--------> it
    --fewer than allowed-----> a new one
    --otherwise--------------> waits, at most `max_waiting` at once
"""

import asyncio
from collections import Counter

import structlog

from kvrelay.errors import OverloadedError, UnavailableError
from kvrelay.runtime.confined_child import ChildStartError, ConfinedChild, Confinement, Limit, OverLimitError

NUM_CHILDREN = 2
MAX_WAITING = 64
MAX_WAIT_S = 10.0
RETRY_AFTER_MS = 1000
START_ADVICE = "allow this process more memory, processes and threads: pids_limit, TasksMax or ulimit -u"


_log = structlog.get_logger(__name__)


class ConfinedPool:
    """Used on one event loop. `work` says in errors and logs what the children do."""

    def __init__(
        self,
        work: str,
        confinement: Confinement,
        *,
        num_children: int = NUM_CHILDREN,
        max_waiting: int = MAX_WAITING,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self.num_started = 0
        self.num_killed: Counter[Limit] = Counter(dict.fromkeys(Limit, 0))
        self._work = work
        self._confinement = confinement
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._turns = asyncio.Semaphore(num_children)
        self._num_waiting = 0
        self._idle: list[ConfinedChild] = []
        self._busy: set[ConfinedChild] = set()
        self._tasks: set[asyncio.Task[bytes | None]] = set()
        self._prestarting: asyncio.Task[bytes | None] | None = None
        self._is_closed = False

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in (*self._idle, *self._busy))

    def prestart(self) -> None:
        """Starts a child in the background unless there is one."""
        if not self._idle and not self._tasks and not self._is_closed:
            self._prestarting = self._run(self._start_idle())

    async def ask(self, request: bytes, max_answer_bytes: int) -> bytes:
        """A cancelled caller leaves the child its work, within its limits.

        Raises:
            OverLimitError: the request took too much; its child was killed.
            OverloadedError: too many requests wait, or this one waited for too long.
            UnavailableError: no child starts.
        """
        if self._turns.locked() and self._num_waiting >= self._max_waiting:
            raise self._overloaded()
        await self._wait_for_turn()
        answer = await asyncio.shield(self._run(self._ask_child(request, max_answer_bytes)))
        assert answer is not None, "only a start answers nothing"
        return answer

    async def close(self) -> None:
        """Kills all children."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for child in (*self._idle, *self._busy):
            await self._end(child)
        self._idle.clear()

    async def _wait_for_turn(self) -> None:
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._turns.acquire()
        except TimeoutError:
            raise self._overloaded() from None
        finally:
            self._num_waiting -= 1

    def _run(self, working: "asyncio._CoroutineLike[bytes | None]") -> "asyncio.Task[bytes | None]":
        task = asyncio.create_task(working, name=self._work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: "asyncio.Task[bytes | None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieves it if the caller is gone

    async def _start_idle(self) -> None:
        """Takes no turn: the first request waits for the child."""
        child = await self._started()
        self._busy.discard(child)
        self._idle.append(child)

    async def _ask_child(self, request: bytes, max_answer_bytes: int) -> bytes:
        """Owns a turn."""
        try:
            child = await self._take_child()
            try:
                answer = await child.ask(request, max_answer_bytes)
            except OverLimitError as over:
                self.num_killed[over.limit] += 1
                _log.info(
                    f"{self._work}: a child is over its limit", limit=over.limit.value, request_bytes=len(request)
                )
                raise
            finally:
                self._busy.discard(child)
                if child.is_usable and not self._is_closed:
                    self._idle.append(child)
                else:
                    await self._end(child)
            return answer
        finally:
            self._turns.release()

    async def _take_child(self) -> ConfinedChild:
        if self._prestarting is not None and not self._prestarting.done():
            await asyncio.wait([self._prestarting])  # rather than start a second one
        while self._idle:
            child = self._idle.pop()
            if child.is_usable:
                self._busy.add(child)
                return child
            await self._end(child)
        return await self._started()

    async def _started(self) -> ConfinedChild:
        if self._is_closed:
            raise UnavailableError(f"{self._work} has stopped; try again elsewhere")
        child = ConfinedChild(self._confinement)
        try:
            await child.start()
        except ChildStartError as error:
            _log.warning(f"{self._work}: no process for it can be started", problem=str(error), advice=START_ADVICE)
            raise UnavailableError(
                f"{self._work} needs a process of its own, which cannot be started now; try again later, or tell the "
                "operator: the log says what is in the way"
            ) from None
        self._busy.add(child)
        self.num_started += 1
        return child

    async def _end(self, child: ConfinedChild) -> None:
        self._busy.discard(child)
        child.kill()
        await child.wait()

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(f"too many others wait for {self._work} now; try again in a moment", RETRY_AFTER_MS)
