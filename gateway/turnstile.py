"""Lets only so many streams write in one turn of the event loop, so that reading comes before writing when there is much of both.

A token that is read costs a fraction of one that is written alone. When more tokens come than can be written one by one, those of
a stream that waits here gather and are written together: an overloaded gateway sends larger messages instead of falling behind.
"""

import asyncio
from collections import deque

STREAMS_PER_TURN = 16


class Turnstile:
    """Shared by all streams of a gateway. A stream that passed holds nothing, however slow its client reads."""

    def __init__(self, streams_per_turn: int = STREAMS_PER_TURN) -> None:
        self._streams_per_turn = streams_per_turn
        self._num_left = streams_per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._turn_is_due = False

    async def pass_through(self) -> None:
        """Returns in this turn of the loop or in one of the next, in the order of the calls."""
        if not self._turn_is_due:
            self._turn_is_due = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._begin_turn, loop)
        if self._num_left > 0 and not self._waiting:
            self._num_left -= 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _begin_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_left = self._streams_per_turn
        while self._waiting and self._num_left > 0:
            future = self._waiting.popleft()
            if not future.done():  # its stream may have been cancelled
                future.set_result(None)
                self._num_left -= 1
        self._turn_is_due = self._num_left < self._streams_per_turn
        if self._turn_is_due:
            loop.call_soon(self._begin_turn, loop)
