"""Structured logs of every process."""

import contextlib
import io
import logging
import select
import sys
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict

from kvrelay.core.quoting import shortened


def configure_logging(level: str, format_: Literal["console", "json"], **context: str) -> None:
    """Sends logs to standard error; `context` is on every line."""
    renderers: list[structlog.typing.Processor]
    if format_ == "json":
        renderers = [structlog.processors.format_exc_info, _with_short_traceback, structlog.processors.JSONRenderer()]
    else:  # plain tracebacks: rich ones print local variables, and those are clients' prompts
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_write_traceback)]
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _with_short_values,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Unbreakable(sys.stderr))),
        cache_logger_on_first_use=False,
    )


MAX_VALUE_CHARACTERS = 1024
MAX_TRACEBACK_CHARACTERS = 16 * 1024


def _with_short_values(logger: object, method: str, event: EventDict) -> EventDict:
    """Others choose names, ids and messages: none makes a line long."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = shortened(value, MAX_VALUE_CHARACTERS)
        elif name != "exc_info" and len(text := str(value)) > MAX_VALUE_CHARACTERS:
            event[name] = shortened(text, MAX_VALUE_CHARACTERS)
    return event


def _with_short_traceback(logger: object, method: str, event: EventDict) -> EventDict:
    if "exception" in event:
        event["exception"] = shortened(event["exception"], MAX_TRACEBACK_CHARACTERS)
    return event


def _write_traceback(stream: TextIO, problem: structlog.typing.ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, problem)
    stream.write(shortened(text.getvalue(), MAX_TRACEBACK_CHARACTERS))


_PIECE_CHARACTERS = 1024
"""A ready pipe takes 4096 bytes without blocking; a character has at most four."""


class _Unbreakable:
    """Drops what cannot be written: a full disk or a stuck reader must not delay requests."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._room = select.poll()
        self._has_descriptor = False
        with contextlib.suppress(OSError, ValueError):  # a stream in memory
            self._room.register(stream.fileno(), select.POLLOUT | select.POLLERR)
            self._has_descriptor = True

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            for begin in range(0, len(text), _PIECE_CHARACTERS):
                if self._has_descriptor and not self._room.poll(0):
                    break
                self._stream.write(text[begin : begin + _PIECE_CHARACTERS])
                self._stream.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
