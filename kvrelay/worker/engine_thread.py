"""Runs an engine loop in a thread, with an inbox for commands.

handle commands  ->  step  ->  handle commands  ->  step  -> ... -> idle: sleep on the inbox
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import structlog

from kvrelay.process import exit_process

CommandT = TypeVar("CommandT")
CommandT_contra = TypeVar("CommandT_contra", contravariant=True)

SWITCH_INTERVAL_S = 0.0002
"""How long another thread keeps the GIL when the engine thread wants it."""

_log = structlog.get_logger(__name__)


class EngineLoop(Protocol[CommandT_contra]):
    """Called in the engine thread only."""

    def handle(self, command: CommandT_contra) -> None: ...

    def step(self) -> bool:
        """False when there was nothing to do."""
        raise NotImplementedError

    def fail_all(self) -> None:
        """After an error outside of any single job."""


class EngineThread(Generic[CommandT]):
    """Any thread may submit commands.

    Args:
        max_commands: most waiting commands with new jobs. Others always fit.
        on_broken: called when `fail_all` fails. A worker without engine must not answer heartbeats,
            so by default the process ends.
        before_turn: not counted in the turn's time.
    """

    def __init__(
        self,
        name: str,
        loop: EngineLoop[CommandT],
        max_commands: int = 4096,
        on_broken: Callable[[], None] = exit_process,
        on_start: Callable[[], None] = lambda: None,
        before_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._max_commands = max_commands
        self._on_broken = on_broken
        self._on_start = on_start
        self._before_turn = before_turn
        self._commands: deque[CommandT] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._turn_began_at: float | None = None
        self.busy_s = 0.0
        """Time of past turns that had something to do."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def turn_s(self) -> float:
        """Duration of the current turn (commands and a step), or 0. For any thread."""
        began_at = self._turn_began_at
        return 0.0 if began_at is None else time.monotonic() - began_at

    def submit(self, command: CommandT) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def submit_job(self, command: CommandT) -> bool:
        """False when the inbox is full."""
        with self._changed:
            if len(self._commands) >= self._max_commands:
                return False
            self._commands.append(command)
            self._changed.notify()
            return True

    def _run(self) -> None:
        busy = True  # publish the idle load once at start
        # After each step another thread needs the lock, and a batch of sequences waits for it.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            self._on_start()
            while (commands := self._take(wait=not busy)) is not None:
                self._before_turn()
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
        # One by one: later commands concern other jobs and must not be lost with a failing one.
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
        _log.exception("the engine loop failed; all its jobs are failed")
        self._loop.fail_all()

    def _take(self, *, wait: bool) -> list[CommandT] | None:
        """None when the thread must end."""
        with self._changed:
            while wait and not self._commands and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands
