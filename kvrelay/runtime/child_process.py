"""A child process that cannot outlive this one, is read line by line, and ends within a bound."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvrelay.runtime import parent_death

LineSink = Callable[[str, str], None]
"""Takes (process name, line without its end)."""

_MAX_LINE_BYTES = 64 * 1024
_NUM_TAIL_LINES = 60


def dying_with_this_process() -> tuple[str, ...]:
    """What stands before a command. See `parent_death`."""
    return (sys.executable, "-I", "-S", str(Path(parent_death.__file__)), str(os.getpid()))


class ChildProcess:
    """Output and errors go, merged, to `on_line` and into `tail`.

    `standard_input` is at most a pipe's 64 KiB; a secret there is not among the arguments.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: LineSink,
        standard_input: bytes = b"",
    ) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=_NUM_TAIL_LINES)
        self._command = tuple(command)
        self._environment = dict(environment)
        self._on_line = on_line
        self._standard_input = standard_input
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_read = asyncio.Event()
        self._is_read.set()

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._started.returncode

    async def start(self) -> None:
        assert self._process is None, "a child process is started once"
        with _pipe_with(self._standard_input) as standard_input:
            self._process = await asyncio.create_subprocess_exec(
                *dying_with_this_process(),
                *self._command,
                env=self._environment,
                stdin=standard_input,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        self._reader = asyncio.create_task(self._read_lines(), name=f"output of {self.name}")

    async def wait(self) -> int:
        exit_code = await self._started.wait()
        assert self._reader is not None
        # A grandchild may hold the pipe open; do not wait for it.
        await asyncio.wait([self._reader], timeout=1.0)
        self._reader.cancel()
        return exit_code

    def stop_reading(self) -> None:
        """For tests: lets the output pipe fill up, until `read_again`."""
        self._is_read.clear()

    def read_again(self) -> None:
        self._is_read.set()

    def send_signal(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            # The process may have ended unnoticed by the event loop.
            with contextlib.suppress(ProcessLookupError):
                self._started.send_signal(number)

    async def stop(self, grace_s: float) -> int:
        """Sends SIGTERM, then SIGKILL after the grace, also when cancelled."""
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
            if len(rest) > _MAX_LINE_BYTES:  # bounds a line without an end
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._emit(line.decode("utf-8", "replace"))
            await self._is_read.wait()
        if rest:
            self._emit(rest.decode("utf-8", "replace"))

    def _emit(self, line: str) -> None:
        # A progress bar draws over itself: keep its last state.
        line = line.rstrip("\r").rpartition("\r")[2]
        self.tail.append(line)
        self._on_line(self.name, line)


@contextlib.contextmanager
def _pipe_with(data: bytes) -> Iterator[int]:
    """A descriptor to read `data` from until its end."""
    if not data:
        yield asyncio.subprocess.DEVNULL
        return
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)  # more than the pipe holds is an error, not a wait
        try:
            if os.write(writer, data) != len(data):
                raise ValueError(f"{len(data)} bytes are more than a pipe takes")
        finally:
            os.close(writer)
        yield reader
    finally:
        os.close(reader)
