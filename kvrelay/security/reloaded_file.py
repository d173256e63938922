"""A file whose content counts anew when it changes. A broken file leaves the content before."""

import os
import stat
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from kvrelay.errors import ConfigError

MAX_FILE_BYTES = 4 * 1024 * 1024

Value = TypeVar("Value")
Signature = tuple[int, int, int, int, int]

_log = structlog.get_logger(__name__)


class ReloadedFile(Generic[Value]):
    """Reads when it is made, or raises ConfigError. `poll` blocks: call it in a thread."""

    def __init__(self, path: str, name: str, parse: Callable[[bytes], Value]) -> None:
        self._path = path
        self.name = name
        self._parse = parse
        self._problem: str | None = None
        self._changing: Signature | None = None
        self._signature: Signature | None = None
        self._value = self._read()

    @property
    def value(self) -> Value:
        return self._value

    @property
    def problem(self) -> str | None:
        """Why the file as it is now does not count; without secrets."""
        return self._problem

    def poll(self) -> bool:
        """Whether there is a new value.

        Reads a file that is as it was a poll before, because it may still be written to.
        """
        try:
            now = _signature_of(os.stat(self._path))
            if now == self._signature or now != self._changing:
                self._changing = now
                return False
            self._value = self._read()
        except ConfigError as failure:
            self._fail(failure.message)
            return False
        except OSError as failure:
            self._signature = None  # read it when it is back, even if it is the same file
            self._fail(f"the {self.name} {self._path} cannot be read: {failure.strerror}")
            return False
        self._problem = None
        _log.info("read again", file=self.name, path=self._path)
        return True

    def _read(self) -> Value:
        try:
            with open(self._path, "rb", opener=_open_without_waiting) as file:
                about = os.fstat(file.fileno())
                data = file.read(MAX_FILE_BYTES + 1) if stat.S_ISREG(about.st_mode) else None
        except OSError as failure:
            raise ConfigError(f"the {self.name} {self._path} cannot be read: {failure.strerror}") from None
        self._signature = _signature_of(about)
        if data is None or len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"the {self.name} {self._path} is no file of at most {MAX_FILE_BYTES} bytes")
        try:
            return self._parse(data)
        except ConfigError as failure:
            raise ConfigError(f"the {self.name} {self._path} {failure.message}") from None

    def _fail(self, problem: str) -> None:
        if problem != self._problem:
            _log.error("a file cannot be used; what it had before still counts", file=self.name, problem=problem)
        self._problem = problem


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer


def _signature_of(about: os.stat_result) -> Signature:
    """Changes with each write: nothing but the kernel sets the change time."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
