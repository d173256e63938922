"""A process with limits of memory and time, for work whose cost a stranger decides.

    started --ready--> idle --request--> busy --answer--> idle
                                          '-- over a limit: killed

It inherits no descriptor and no variable of this process, and cannot outlive it.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum

from kvrelay.own_packages import own_module_command
from kvrelay.runtime.child_process import dying_with_this_process
from kvrelay.runtime.confined_main import HEADER, LAST_ANSWER
from kvrelay.runtime.own_time import own_time_limit

START_TIMEOUT_S = 60.0
EXIT_TIMEOUT_S = 5.0
FIRST_LOOK_S = 0.001
LONGEST_LOOK_S = 0.05
MAX_STARTUP_PROBLEM_BYTES = 2000
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ")
"""The interpreter may need the first to start; templates ask for the local time."""


class Limit(Enum):
    TIME = "time"
    MEMORY = "memory"
    """Also a crash of native code, whose usual cause it is."""
    ANSWER = "answer"


class ChildStartError(Exception):
    """The message is what the child or the system said."""


class OverLimitError(Exception):
    """The request took more than the child may use. The child is dead."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit.value)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Confinement:
    module: str
    cpu_ms: int
    wall_ms: int
    """Longer than `cpu_ms`, because a loaded machine makes no request dear."""
    memory_bytes: int
    """Above what the child has when it is ready."""
    niceness: int = 0


class ConfinedChild:
    """Answers one request at a time. Used on one event loop."""

    def __init__(self, confinement: Confinement) -> None:
        self._confinement = confinement
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ends = False

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """False once it has given its last answer, or was ended from outside."""
        if self._process is None or self._reader is None:
            return False
        return not self._ends and not self._reader.at_eof() and self._process.poll() is None

    async def start(self) -> None:
        """Raises ChildStartError when it does not become ready."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = self._launch(theirs)
            except OSError as error:
                ours.close()
                raise ChildStartError(str(error)) from error
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._reader, self._writer = await asyncio.open_connection(sock=ours)
                self._write(_import_paths())
                await self._reader.readexactly(HEADER.size)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            raise ChildStartError(await self._startup_problem()) from None
        except asyncio.CancelledError:
            self.kill()
            await self.wait()
            raise
        assert self._process.stderr is not None
        self._process.stderr.close()

    async def ask(self, request: bytes, max_answer_bytes: int) -> bytes:
        """Raises OverLimitError, and has killed the child then, also when cancelled."""
        assert self._reader is not None, "not started"
        is_done = False
        try:
            async with own_time_limit(self._confinement.wall_ms / 1000):
                self._write(request)
                kind, num_bytes = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if num_bytes > max_answer_bytes:
                    raise OverLimitError(Limit.ANSWER)
                answer = await self._reader.readexactly(num_bytes)
            is_done, self._ends = True, kind == LAST_ANSWER
            return answer
        except TimeoutError:
            raise OverLimitError(Limit.TIME) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            ended_by = await self.wait()
            raise OverLimitError(Limit.TIME if ended_by == -signal.SIGPROF else Limit.MEMORY) from None
        finally:
            if not is_done:
                self.kill()

    def kill(self) -> None:
        self._ends = True
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        if self._writer is not None:
            self._writer.close()

    async def wait(self) -> int:
        """Returns the exit code of a child that was killed, or has closed its side."""
        assert self._process is not None, "not started"
        try:
            exit_code = await self._exit_code(self._process)
            if exit_code is None:
                self._process.kill()
                exit_code = await self._exit_code(self._process)
            # None: a system call holds it; the kernel ends it then
            return -signal.SIGKILL if exit_code is None else exit_code
        finally:
            if self._process.stderr is not None:
                self._process.stderr.close()

    async def _exit_code(self, process: subprocess.Popen[bytes]) -> int | None:
        """Polls: a thread to wait in may not start either."""
        pause_s, loop = FIRST_LOOK_S, asyncio.get_running_loop()
        end = loop.time() + EXIT_TIMEOUT_S
        while (exit_code := process.poll()) is None and loop.time() < end:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_LOOK_S)
        return exit_code

    def _launch(self, stdin: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command(),
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        )

    def _command(self) -> list[str]:
        limits = self._confinement
        numbers = (limits.cpu_ms, limits.memory_bytes, limits.niceness)
        main = own_module_command("kvrelay.runtime.confined_main", limits.module, *map(str, numbers), is_isolated=True)
        return [*dying_with_this_process(), *main]

    def _write(self, content: bytes) -> None:
        assert self._writer is not None, "not started"
        self._writer.write(HEADER.pack(0, len(content)) + content)

    async def _startup_problem(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        self.kill()
        await self._exit_code(self._process)
        os.set_blocking(self._process.stderr.fileno(), False)
        errors = self._process.stderr.read() or b""
        await self.wait()
        return errors[-MAX_STARTUP_PROBLEM_BYTES:].decode("utf-8", "replace").strip() or "it says nothing"


def _import_paths() -> bytes:
    """An isolated interpreter finds no packages of the user, nor PYTHONPATH."""
    return json.dumps([os.path.abspath(path) for path in sys.path]).encode()
