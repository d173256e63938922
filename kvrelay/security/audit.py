"""The audit log: who was refused what, and who reached for requests of others; never any content.

    {"time": "2030-01-31T12:00:00.000Z", "who": "alice-1", "method": "/kvrelay.v1...",
     "request_id": "", "decision": "refused", "reason": "ACCESS_DENIED"}

A thread writes. What it cannot take is counted, and the count becomes a line.
"""

import datetime
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import BinaryIO

import structlog

from kvrelay.core.quoting import shortened
from kvrelay.errors import ConfigError
from kvrelay.security.principal import Principal

MAX_WAITING_LINES = 10_000
MAX_LINES_PER_S = 1000
"""So that strangers cannot fill the disk at once."""
MAX_FIELD_CHARACTERS = 128
CLOSE_TIMEOUT_S = 5.0

ALLOWED, REFUSED, LOST = "allowed", "refused", "lost"
OTHER_TENANT = "OTHER_TENANT"

_log = structlog.get_logger(__name__)


class AuditLog:
    """Appends to the file. After a rotation, which moves it away, a new one is begun."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING_LINES)
        self._second, self._num_in_second = 0, 0
        self._num_lost = 0
        try:
            self._file = _open(path)
        except OSError as failure:
            raise ConfigError(f"audit_log {path} cannot be written: {failure.strerror}") from None
        self._thread = threading.Thread(target=self._write_all, name="audit log", daemon=True)
        self._thread.start()

    def record(self, *, who: str, method: str, request_id: str, decision: str, reason: str) -> None:
        """Never waits. Only one thread, that of the event loop, calls it."""
        now = self._clock()
        if int(now) != self._second:
            self._second, self._num_in_second = int(now), 0
        self._num_in_second += 1
        if self._num_in_second > MAX_LINES_PER_S:
            self._num_lost += 1
            return
        self._tell_of_lost(now)
        self._put(_line(now, who=who, method=method, request_id=request_id, decision=decision, reason=reason))

    def reopen(self) -> None:
        """After a rotation; any line would do it too."""
        self._put(b"", 0)

    def close(self) -> None:
        """Waits, within a bound, until everything is written."""
        try:
            if self._num_lost:
                self._lines.put(self._line_of_lost(self._clock()), timeout=CLOSE_TIMEOUT_S)
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return  # the disk hangs
        self._thread.join(CLOSE_TIMEOUT_S)

    def _tell_of_lost(self, now: float) -> None:
        if num_lost := self._num_lost:
            self._put(self._line_of_lost(now), num_lost)

    def _line_of_lost(self, now: float) -> bytes:
        num_lost, self._num_lost = self._num_lost, 0
        return _line(now, decision=LOST, reason=f"{num_lost} lines were too many", num_lines=num_lost)

    def _put(self, line: bytes, num_lines: int = 1) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_lost += num_lines

    def _write_all(self) -> None:
        problem: str | None = None
        while (line := self._lines.get()) is not None:
            try:
                self._follow_rotation()
                self._file.write(line)
            except OSError as failure:
                if problem != failure.strerror:
                    _log.error("the audit log cannot be written", path=self._path, problem=failure.strerror)
                problem = failure.strerror
            else:
                problem = None
        self._file.close()

    def _follow_rotation(self) -> None:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            there = None
        here = os.fstat(self._file.fileno())
        if there is None or (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            file = _open(self._path)
            self._file.close()
            self._file = file


class CallAudit:
    def __init__(self, log: AuditLog, principal: Principal, method: str) -> None:
        self._log = log
        self._principal = principal
        self._method = method
        self._last: tuple[str, str] | None = None

    def record(self, request_id: str, decision: str, reason: str) -> None:
        """A decision that is made again, as here and then in the store, is written once."""
        if (request_id, decision) == self._last:
            return
        self._last = request_id, decision
        who, method = self._principal.key_id, self._method
        self._log.record(who=who, method=method, request_id=request_id, decision=decision, reason=reason)


_current: ContextVar[CallAudit | None] = ContextVar("audit of the call", default=None)


def set_current_audit(audit: CallAudit | None) -> None:
    """Only the guard of a process calls this."""
    _current.set(audit)


def record_access(request_id: str, *, allowed: bool, is_own: bool) -> None:
    """Writes down that the current call reached for a request of another tenant."""
    audit = _current.get()
    if audit is not None and not is_own:
        audit.record(request_id, ALLOWED if allowed else REFUSED, OTHER_TENANT)


def _open(path: str) -> BinaryIO:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would wait for its reader
    return open(os.open(path, flags, 0o600), "wb", buffering=0)


def _line(now: float, **fields: str | int) -> bytes:
    time_text = datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="milliseconds")
    cut = {
        name: shortened(value, MAX_FIELD_CHARACTERS) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    return json.dumps({"time": time_text.replace("+00:00", "Z"), **cut}).encode() + b"\n"
