"""Structured logs of every process, and where a request's time went."""

import contextlib
import logging
import select
import sys
from dataclasses import dataclass
from typing import Literal, TextIO, cast

import structlog


@dataclass(frozen=True, slots=True)
class Phases:
    """Where a request's time went; times in milliseconds. The proto of the same name says what each is."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    exposed_transfer_ms: float = 0.0
    transfer_wire_ms: float = 0.0
    transfer_bytes: int = 0
    handoff_gap_ms: float = 0.0
    decode_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    total_ms: float = 0.0
    num_attempts: int = 0
    prefilled_on_decode_worker: bool = False
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    transfer_transport: str = ""


def configure_logging(level: str, format_: Literal["console", "json"], **context: str) -> None:
    """Sends logs to standard error from now on; `context` is on every line."""
    renderers: list[structlog.typing.Processor]
    if format_ == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:  # plain tracebacks: rich ones print local variables, and those are clients' prompts
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Unbreakable(sys.stderr))),
        cache_logger_on_first_use=False,
    )


_PIECE_CHARACTERS = 1024
"""A pipe that has room takes 4096 bytes without blocking, and a character has four at most."""


class _Unbreakable:
    """A stream that loses what cannot be written: a full disk, or a reader that is gone or does not read, must not end anybody's
    request, or hold it up."""

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
