"""A command that runs on a terminal of its own, for tests that type what only a terminal turns into
signals and ends of input.
"""

import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

TIMEOUT_S = 60.0

# A program becomes what its terminal's Ctrl-C interrupts only by taking it as its controlling
# terminal. Done in the new process, and not between fork and exec: gRPC's threads make that unsafe.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A Python program on a terminal. As a context it is killed at the end if it has not ended, and
    waited for.

    Args:
        arguments: of the Python interpreter.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.shown = b""
        self._terminal, theirs = os.openpty()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TAKE_TERMINAL, *arguments],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def read_until(self, end: bytes) -> None:
        """Reads on until what was shown ends so, and no more. Raises AssertionError: the program
        ended or was silent.
        """
        while self._read(1):
            if self.shown.endswith(end):
                return
        raise AssertionError(f"ended: {self.shown!r}")

    def type(self, keys: bytes) -> None:
        """Types them."""
        os.write(self._terminal, keys)

    def wait(self) -> int:
        """Reads until the program has ended; its exit code. Raises AssertionError: it was silent,
        and did not end.
        """
        while self._read(1024):
            pass
        return self._process.wait(TIMEOUT_S)

    def _read(self, num_bytes: int) -> bytes:
        """What is shown next; empty when the program has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._terminal, selectors.EVENT_READ)
            assert selector.select(TIMEOUT_S), f"silent for {TIMEOUT_S:g} s, after it showed {self.shown!r}"
        try:
            read = os.read(self._terminal, num_bytes)
        except OSError:  # how Linux says that the other side is closed
            return b""
        self.shown += read
        return read
