"""Limits how many streams write per event-loop iteration. Under overload, streams batch tokens."""

import asyncio
from collections import deque

STREAMS_PER_ITERATION = 16


class WriteThrottle:
    """Shared by all streams of a gateway."""

    def __init__(self, streams_per_iteration: int = STREAMS_PER_ITERATION) -> None:
        self._streams_per_iteration = streams_per_iteration
        self._num_left = streams_per_iteration
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_scheduled = False

    async def acquire(self) -> None:
        """Returns in this iteration or a later one, in the order of the calls. Needs no release."""
        if not self._is_scheduled:
            self._is_scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._begin_iteration, loop)
        if self._num_left > 0 and not self._waiting:
            self._num_left -= 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _begin_iteration(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_left = self._streams_per_iteration
        while self._waiting and self._num_left > 0:
            future = self._waiting.popleft()
            if not future.done():  # its stream may have been cancelled
                future.set_result(None)
                self._num_left -= 1
        self._is_scheduled = self._num_left < self._streams_per_iteration
        if self._is_scheduled:
            loop.call_soon(self._begin_iteration, loop)
