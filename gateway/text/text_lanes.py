"""Runs functions on texts off the event loop, in bounded queues.

They must release the interpreter lock, and be short, because a thread cannot be cancelled.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from kvrelay.errors import DeadlineError, OverloadedError

ResultT = TypeVar("ResultT")

INLINE_BYTES = 2048
"""Below it, a thread would cost more time than it saves."""
SHORT_BYTES = 64 * 1024
"""Longer texts delay only each other."""
NUM_SHORT_THREADS = 2
NUM_LONG_THREADS = 1
MAX_SHORT_WAITING = 256
MAX_LONG_WAITING = 32
RETRY_AFTER_MS = 1000


class TextLanes:
    def __init__(self, max_short_waiting: int = MAX_SHORT_WAITING, max_long_waiting: int = MAX_LONG_WAITING) -> None:
        self._short = _Lane(NUM_SHORT_THREADS, max_short_waiting)
        self._long = _Lane(NUM_LONG_THREADS, max_long_waiting)

    async def run(self, num_bytes: int, deadline: float, function: Callable[[], ResultT]) -> ResultT:
        """Calls the function on a text of `num_bytes`; `deadline` in monotonic seconds.

        Raises:
            DeadlineError: the deadline passed first.
            OverloadedError: too many texts wait.
        """
        if num_bytes <= INLINE_BYTES:
            return function()
        lane = self._short if num_bytes <= SHORT_BYTES else self._long
        return await lane.run(deadline, function)


class _Lane:
    def __init__(self, num_threads: int, max_waiting: int) -> None:
        self._turns = asyncio.Semaphore(num_threads)
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def run(self, deadline: float, function: Callable[[], ResultT]) -> ResultT:
        try:
            async with asyncio.timeout_at(deadline):
                await self._wait_for_turn()
                running = asyncio.ensure_future(asyncio.to_thread(function))
                running.add_done_callback(self._on_ended)
                return await asyncio.shield(running)
        except TimeoutError:
            problem = "the request's deadline passed before its text was read; send a shorter text, or allow more time"
            raise DeadlineError(problem) from None

    async def _wait_for_turn(self) -> None:
        if self._turns.locked() and self._num_waiting >= self._max_waiting:
            raise OverloadedError("too many long texts are being read now; try again in a moment", RETRY_AFTER_MS)
        self._num_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._num_waiting -= 1

    def _on_ended(self, running: "asyncio.Future[Any]") -> None:
        self._turns.release()
        if not running.cancelled():
            running.exception()  # retrieves it if the caller is gone
