"""The thread that owns a worker's model, scheduler and block manager, and the inbox through which others talk to it.

    handle commands  ->  step  ->  handle commands  ->  step  -> ... -> nothing to do: sleep on the inbox

Knows nothing of what commands and steps are.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import structlog

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)

SWITCH_INTERVAL_S = 0.0002
"""For how long other threads may keep the interpreter lock once the engine thread wants it."""

_log = structlog.get_logger(__name__)


class EngineLoop(Protocol[CommandT_contra]):
    """What the thread runs. All methods are called in the engine thread only."""

    def handle(self, command: CommandT_contra) -> None:
        """Takes one command."""

    def step(self) -> bool:
        """Does one step; False when there was nothing to do."""
        raise NotImplementedError

    def fail_all(self) -> None:
        """Something broke outside of any single work: ends all works, so that the worker goes on from a known state."""


def _exit_process() -> None:
    os._exit(1)


class EngineThread(Generic[CommandT]):
    """Runs an EngineLoop. `submit` may be called from any thread.

    Args:
        name: of the thread.
        loop: what to run.
        max_commands: of those that bring new work; others always fit, for each work causes a bounded number of them.
        on_broken: called in the thread when not even `fail_all` works. By default the process ends: a worker without its engine
            would answer heartbeats and hold works that never end.
        on_start: called in the thread before anything else.
    """

    def __init__(
        self,
        name: str,
        loop: EngineLoop[CommandT],
        max_commands: int = 4096,
        on_broken: Callable[[], None] = _exit_process,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._max_commands = max_commands
        self._on_broken = on_broken
        self._on_start = on_start
        self._commands: deque[CommandT] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._turn_began_at: float | None = None
        self.busy_s = 0.0
        """For how long there has been something to do, in seconds, without the current turn. Written by the thread."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step, and waits for that."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def turn_s(self) -> float:
        """For how long the current turn, commands and a step, has been going on, in seconds; 0 at rest. Asked in any thread."""
        began_at = self._turn_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def submit(self, command: CommandT) -> None:
        """Puts a command into the inbox."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def submit_work(self, command: CommandT) -> bool:
        """Puts a command that brings new work into the inbox; False when it is full."""
        with self._changed:
            if len(self._commands) >= self._max_commands:
                return False
            self._commands.append(command)
            self._changed.notify()
            return True

    def _run(self) -> None:
        busy = True  # the first step has nothing to do but to say so: the load of a worker at rest
        # Behind every step waits a thread that wants the interpreter lock only for a moment, and a batch of sequences with it.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            self._on_start()
            while (commands := self._take(wait=not busy)) is not None:
                self._turn_began_at = time.monotonic()
                for command in commands:
                    self._handle(command)
                busy = self._step()
                if commands or busy:
                    self.busy_s += time.monotonic() - self._turn_began_at
                self._turn_began_at = None
        except Exception:
            _log.critical("the engine thread cannot go on", exc_info=True)
            self._on_broken()

    def _handle(self, command: CommandT) -> None:
        # Each by itself: the commands behind one that fails are about other works, whose ends would be missed.
        try:
            self._loop.handle(command)
        except Exception:
            self._fail_all()

    def _step(self) -> bool:
        try:
            return self._loop.step()
        except Exception:
            self._fail_all()
            return True

    def _fail_all(self) -> None:
        _log.exception("the engine loop failed; all its work is failed")
        self._loop.fail_all()

    def _take(self, *, wait: bool) -> list[CommandT] | None:
        """All waiting commands; None when the thread is to end."""
        with self._changed:
            while wait and not self._commands and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands
