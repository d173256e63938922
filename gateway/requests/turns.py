"""Lets a few callers work at once, and a bounded number wait for their turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvrelay.errors import OverloadedError

MAX_WAIT_S = 10.0
RETRY_AFTER_MS = 1000


class Turns:
    """`work` names in errors what they wait for."""

    def __init__(self, work: str, at_once: int, max_waiting: int, max_wait_s: float = MAX_WAIT_S) -> None:
        self._work = work
        self._free = asyncio.Semaphore(at_once)
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._num_waiting = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Raises OverloadedError when too many wait, or this caller waited for too long."""
        await self._wait()
        try:
            yield
        finally:
            self._free.release()

    async def _wait(self) -> None:
        if self._free.locked() and self._num_waiting >= self._max_waiting:
            raise self._overloaded()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._free.acquire()
        except TimeoutError:
            raise self._overloaded() from None
        finally:
            self._num_waiting -= 1

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(f"too many others wait for {self._work} now; try again in a moment", RETRY_AFTER_MS)
