"""Structured logs of every process, and where a request's time went."""

import contextlib
import logging
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


class _Unbreakable:
    """A stream that loses what cannot be written: a full disk or a reader that is gone must not end anybody's request."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
