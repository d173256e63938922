"""One child process: it cannot outlive this one, is read line by line, and ends within a bound. Knows nothing of what it runs."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvrelay import die_with_parent

LineSink = Callable[[str, str], None]
"""Takes (name of the process, one line of its output without the line's end)."""

_MAX_LINE_BYTES = 64 * 1024
_NUM_TAIL_LINES = 60


class ChildProcess:
    """A named command. Its standard output and error go, merged, to `on_line` and into `tail`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], on_line: LineSink) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=_NUM_TAIL_LINES)
        self._command = tuple(command)
        self._environment = dict(environment)
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_read = asyncio.Event()
        self._is_read.set()

    @property
    def pid(self) -> int:
        """The process id; the same before and after its end."""
        return self._started.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._started.returncode

    async def start(self) -> None:
        """Starts it. Its standard input is empty.

        Raises:
            OSError: the interpreter cannot be run.
        """
        assert self._process is None, "a child process is started once"
        launcher = (sys.executable, "-E", "-S", str(Path(die_with_parent.__file__)), str(os.getpid()))
        self._process = await asyncio.create_subprocess_exec(
            *launcher,
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read_lines(), name=f"output of {self.name}")

    async def wait(self) -> int:
        """Waits for its end and for the last of its output; its exit code."""
        exit_code = await self._started.wait()
        assert self._reader is not None
        # A grandchild may hold the pipe open; what it writes is not worth waiting for.
        await asyncio.wait([self._reader], timeout=1.0)
        self._reader.cancel()
        return exit_code

    def stop_reading(self) -> None:
        """Leaves its output where it is, so that its pipe fills up, until `read_again`. For tests of what it does then."""
        self._is_read.clear()

    def read_again(self) -> None:
        """Ends `stop_reading`."""
        self._is_read.set()

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens when it has ended."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):  # it ended, and the event loop has not noticed yet
                self._started.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL after the grace, also when the wait is cancelled; its exit code."""
        self.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            self._emit(f"did not end within {grace_s:g} s of SIGTERM: killed")
        finally:
            self.send_signal(signal.SIGKILL)
        return await self.wait()

    @property
    def _started(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process

    async def _read_lines(self) -> None:
        stream = self._started.stdout
        assert stream is not None
        rest = b""
        while chunk := await stream.read(_MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:  # a line without an end must not grow without one
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._emit(line.decode("utf-8", "replace"))
            await self._is_read.wait()
        if rest:
            self._emit(rest.decode("utf-8", "replace"))

    def _emit(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2]  # of a progress bar that draws over itself, only its last state
        self.tail.append(line)
        self._on_line(self.name, line)
