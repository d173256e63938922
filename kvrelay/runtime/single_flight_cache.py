"""Keeps slow results, and makes each only once at a time.

get -> kept? -> being made? -> else one task for all callers of the key -> kept
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ResultT = TypeVar("ResultT")


class SingleFlightCache(Generic[KeyT, ResultT]):
    """Used on one event loop. A failure goes to all waiting callers, and is not kept.

    A result above `max_bytes` is not kept at all.
    """

    def __init__(
        self,
        make: Callable[[KeyT], Coroutine[Any, Any, ResultT]],
        max_kept: int,
        task_name: str,
        *,
        max_bytes: float = math.inf,
        size_of: Callable[[ResultT], int] = lambda result: 0,
    ) -> None:
        self._make = make
        self._max_kept = max_kept
        self._task_name = task_name
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._num_bytes = 0
        self._kept: OrderedDict[KeyT, ResultT] = OrderedDict()
        self._running: dict[KeyT, asyncio.Task[ResultT]] = {}

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def num_running(self) -> int:
        return len(self._running)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._kept or key in self._running

    def kept(self, key: KeyT) -> ResultT | None:
        return self._kept.get(key)

    async def get(self, key: KeyT) -> ResultT:
        """A cancelled caller leaves the others waiting."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = asyncio.create_task(self._make_and_keep(key), name=self._task_name)
            running.add_done_callback(_retrieve_failure)
        return await asyncio.shield(running)

    async def _make_and_keep(self, key: KeyT) -> ResultT:
        try:
            result = await self._make(key)
        finally:
            del self._running[key]
        self._kept[key] = result
        self._num_bytes += self._size_of(result)
        while len(self._kept) > self._max_kept or self._num_bytes > self._max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= self._size_of(dropped)
        return result


def _retrieve_failure(task: "asyncio.Task[ResultT]") -> None:
    """Otherwise asyncio logs a failure that no caller waits for."""
    if not task.cancelled():
        task.exception()
