"""Results that take time: made once for all who ask meanwhile, and kept, the least recently used dropped first.

    get -> kept? -> being made? -> else one task for all who ask for the same key -> kept

Knows nothing of what the results are.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
ResultT = TypeVar("ResultT")


class ResultCache(Generic[KeyT, ResultT]):
    """Used on one event loop.

    Args:
        make: makes the result of a key; what it raises goes to all who wait, and is not kept.
        max_kept: most results kept.
        task_name: of the tasks that make.
    """

    def __init__(self, make: Callable[[KeyT], Coroutine[Any, Any, ResultT]], max_kept: int, task_name: str) -> None:
        self._make = make
        self._max_kept = max_kept
        self._task_name = task_name
        self._kept: OrderedDict[KeyT, ResultT] = OrderedDict()
        self._running: dict[KeyT, asyncio.Task[ResultT]] = {}

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    @property
    def num_running(self) -> int:
        """Results that are being made."""
        return len(self._running)

    def __contains__(self, key: KeyT) -> bool:
        """Whether the result is kept, or being made."""
        return key in self._kept or key in self._running

    def kept(self, key: KeyT) -> ResultT | None:
        """The result when it is there already."""
        return self._kept.get(key)

    async def get(self, key: KeyT) -> ResultT:
        """The result. Who is cancelled while waiting takes nothing from others who wait.

        Raises:
            Exception: what `make` raises.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = asyncio.create_task(self._make_and_keep(key), name=self._task_name)
            running.add_done_callback(_look_at_failure)
        return await asyncio.shield(running)

    async def _make_and_keep(self, key: KeyT) -> ResultT:
        try:
            result = await self._make(key)
        finally:
            del self._running[key]
        self._kept[key] = result
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)
        return result


def _look_at_failure(task: "asyncio.Task[ResultT]") -> None:
    """Those who asked may have gone; then nobody else does."""
    if not task.cancelled():
        task.exception()
