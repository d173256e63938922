"""Threads of a simulated process: those that export and import KV, and the one that owns the
engine. They run on virtual time.

The engine's step lasts: while it computes a layer, everybody else goes on, its own process
included.
"""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Generic, TypeVar

from kvrelay.worker.engine_thread import EngineLoop
from tests.simulation.virtual_time import ProcessDiedError, ProcessLoop

CommandT = TypeVar("CommandT")

SHORTEST_JOB_S = 0.00005
LONGEST_JOB_S = 0.003
SLOWEST_JOB_S = 0.08


class SimulatedThreads(Executor):
    """A pool whose jobs each take a moment, drawn by the seed. What a job does happens at the end
    of that moment.

    Args:
        loop: of the process.
        slow_jobs: share of jobs whose thread gets no core for a while.
    """

    def __init__(self, loop: ProcessLoop, slow_jobs: float) -> None:
        self._loop = loop
        self._slow_jobs = slow_jobs

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        random = self._loop.world.random
        longest_s = SLOWEST_JOB_S if random.random() < self._slow_jobs else LONGEST_JOB_S
        delay_s = random.uniform(SHORTEST_JOB_S, longest_s)
        self._loop.call_later(delay_s, self._run, future, fn, args, kwargs)
        return future

    @staticmethod
    def _run(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = fn(*args, **kwargs)
        except Exception as failure:
            future.set_exception(failure)
        else:
            future.set_result(result)


class SimulatedEngineThread(Generic[CommandT]):
    """In place of `kvrelay.worker.engine_thread.EngineThread`: handles what waits, steps, and
    again, until there is nothing to do.

    Args:
        process_loop: of the process.
        engine_loop: what to run.
        max_commands: of those that bring new jobs.
    """

    def __init__(self, process_loop: ProcessLoop, engine_loop: EngineLoop[CommandT], max_commands: int) -> None:
        self._process_loop = process_loop
        self._engine_loop = engine_loop
        self._max_commands = max_commands
        self._commands: list[CommandT] = []
        self._turn_is_due = False
        self._in_turn = False
        self.num_failures = 0
        """Commands or steps that failed as a whole: never by anything that a request or a peer
        does.
        """

    def start(self) -> None:
        self._wake()

    def submit(self, command: CommandT) -> None:
        self._commands.append(command)
        self._wake()

    def submit_job(self, command: CommandT) -> bool:
        if len(self._commands) >= self._max_commands:
            return False
        self.submit(command)
        return True

    @property
    def is_idle(self) -> bool:
        return not self._commands and not self._turn_is_due and not self._in_turn

    def _wake(self) -> None:
        if not self._turn_is_due and not self._in_turn:
            self._turn_is_due = True
            self._process_loop.call_later(self._process_loop.world.random.uniform(0.0, 0.0003), self._turn)

    def _turn(self) -> None:
        self._turn_is_due, self._in_turn = False, True
        try:
            commands, self._commands = self._commands, []
            for command in commands:
                self._engine_loop.handle(command)
            busy = self._engine_loop.step()
        except ProcessDiedError:
            return
        except Exception as failure:
            self.num_failures += 1
            self._process_loop.world.problems.append(f"{self._process_loop.name}: the engine loop failed: {failure!r}")
            raise
        finally:
            self._in_turn = False
        if busy or self._commands:
            self._wake()
