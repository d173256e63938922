"""Virtual time: one queue of callbacks for all processes, and for each process an event loop that
it takes for asyncio's.

Time advances from one callback to the next, so that seconds of waiting cost nothing. A process that
is stopped keeps what is due for it until it is continued; one that is dead never runs again.

Knows nothing of what processes are.
"""

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from random import Random
from typing import Any

MAX_CALLBACKS = 400_000
"""A seed with more of them runs in circles."""
MAX_AWAITS_AT_END = 20


class SimulationError(Exception):
    """The simulation itself cannot go on."""


class ProcessDiedError(BaseException):
    """Unwinds the engine of a process that was killed in the middle of a step. No handler may take
    it for a failure.
    """


class ScheduledCall:
    """A callback that is due; what asyncio calls a handle."""

    __slots__ = ("arguments", "call", "context", "due", "is_cancelled", "owner")

    def __init__(
        self,
        owner: "ProcessLoop",
        due: float,
        call: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> None:
        self.owner = owner
        self.due = due
        self.call = call
        self.arguments = arguments
        self.context = context
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.due


class World:
    """The queue and the clock.

    Args:
        seed: decides everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        """Virtual monotonic seconds."""
        self.num_callbacks = 0
        self.problems: list[str] = []
        """What tasks and callbacks failed with though nobody may fail."""
        self._timers: list[tuple[float, int, ScheduledCall]] = []
        self.ready: deque[ScheduledCall] = deque()
        self._num_timers = 0
        self._loops: list[ProcessLoop] = []

    def new_loop(self, name: str) -> "ProcessLoop":
        """The event loop of a new process."""
        loop = ProcessLoop(self, name)  # type: ignore[abstract]
        self._loops.append(loop)
        return loop

    def schedule(
        self,
        loop: "ProcessLoop",
        due: float,
        call: Callable[..., object],
        arguments: tuple[Any, ...],
        context: contextvars.Context | None = None,
    ) -> ScheduledCall:
        """Calls at a time, or behind all that is due now."""
        scheduled = ScheduledCall(loop, due, call, arguments, context)
        if due <= self.now:
            self.ready.append(scheduled)
        else:
            self._num_timers += 1
            heapq.heappush(self._timers, (due, self._num_timers, scheduled))
        return scheduled

    def run_until(self, time: float) -> None:
        """Runs what is due until that time. May be called within a callback: then the others go on."""
        outer, ready = asyncio._get_running_loop(), self.ready
        try:
            while ready or self._advance(time):
                if ready:
                    self._run(ready.popleft())
        finally:
            asyncio._set_running_loop(outer)

    def close(self) -> None:
        """Ends all tasks without running what they still have to do elsewhere."""
        for loop in self._loops:
            loop.kill()
        for loop in self._loops:
            loop.close_tasks()
        self._timers.clear()
        self.ready.clear()

    def resume(self, calls: deque[ScheduledCall]) -> None:
        """What a process that was stopped has missed."""
        self.ready.extend(calls)
        calls.clear()

    def _advance(self, time: float) -> bool:
        """Moves the clock to the next timers; False when none is due by then."""
        while self._timers and self._timers[0][2].is_cancelled:
            heapq.heappop(self._timers)
        if not self._timers or self._timers[0][0] > time:
            self.now = max(self.now, time)
            return False
        self.now = self._timers[0][0]
        while self._timers and self._timers[0][0] <= self.now:
            self.ready.append(heapq.heappop(self._timers)[2])
        return True

    def _run(self, scheduled: ScheduledCall) -> None:
        loop = scheduled.owner
        if scheduled.is_cancelled or loop.is_dead:
            return
        if loop.is_stopped:
            loop.missed.append(scheduled)
            return
        self.num_callbacks += 1
        if self.num_callbacks > MAX_CALLBACKS:
            raise SimulationError(f"more than {MAX_CALLBACKS} callbacks: the cluster runs in circles")
        asyncio._set_running_loop(loop)
        if scheduled.context is None:
            scheduled.call(*scheduled.arguments)
        else:
            scheduled.context.run(scheduled.call, *scheduled.arguments)


class ProcessLoop(asyncio.AbstractEventLoop):
    """What a process takes for its event loop: as much of one as production asks for.

    Args:
        world: whose clock it has.
        name: for people.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.is_stopped = False
        self.missed: deque[ScheduledCall] = deque()
        """What came due while the process was stopped."""
        self._tasks: list[asyncio.Task[Any]] = []

    def kill(self) -> None:
        """Nothing of the process runs any more."""
        self.is_dead = True
        self.missed.clear()

    def stop_process(self) -> None:
        """As SIGSTOP does."""
        self.is_stopped = True

    def continue_process(self) -> None:
        """As SIGCONT does."""
        self.is_stopped = False
        self.world.resume(self.missed)

    def close_tasks(self) -> None:
        """Closes the coroutines of a dead process, so that none is left for the garbage collector
        to complain about.
        """
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine = task.get_coro()
                _close(coroutine)  # type: ignore[arg-type]
            elif not task.cancelled():
                task.exception()
        self._tasks.clear()
        asyncio._set_running_loop(outer)

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str = "") -> "asyncio.Task[Any]":
        """Starts a task from outside of the process."""
        return self.create_task(coroutine, name=name)

    # --- what asyncio asks of a loop

    def time(self) -> float:
        return self.world.now

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> ScheduledCall:  # type: ignore[override]
        scheduled = ScheduledCall(self, 0.0, callback, args, context)
        self.world.ready.append(scheduled)
        return scheduled

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> ScheduledCall:  # type: ignore[override]
        return self.world.schedule(self, self.world.now + max(delay, 0.0), callback, args, context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> ScheduledCall:  # type: ignore[override]
        return self.world.schedule(self, when, callback, args, context)

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> "asyncio.Task[Any]":
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        if self.is_dead:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.is_dead

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Whatever asyncio complains about is a defect, unless the process is dead."""
        if not self.is_dead:
            self.world.problems.append(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")


def _close(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Ends a coroutine as a cancellation does, also one that awaits within `finally` or misses
    there what is gone.
    """
    for _ in range(MAX_AWAITS_AT_END):
        try:
            coroutine.throw(asyncio.CancelledError())
        except (Exception, asyncio.CancelledError):
            return


@contextlib.contextmanager
def no_running_loop() -> Iterator[None]:
    """Within it asyncio knows no loop; afterwards the one that it knew before."""
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(before)
