"""Reads text from standard input, whole or line by line, within bounds."""

import io
import sys
from collections.abc import Iterator
from typing import IO

from kvrelay.errors import InvalidRequestError

MAX_TEXT_BYTES = 8 * 1024 * 1024
"""The gateway's limit for one message."""


def text_or_standard_input(argument: str | None, field: str) -> str:
    """The argument, or standard input if it is missing or "-".

    Drops the final line end, because a model would continue after it. Raises InvalidRequestError.
    """
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise InvalidRequestError(field, "is missing: give it as an argument, or through a pipe")
    text = _decode(_source().read(MAX_TEXT_BYTES + 1), field)
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InvalidRequestError(field, "is empty: nothing came through standard input")
    return text


def standard_input_lines(field: str) -> Iterator[str]:
    """Without line ends. Raises InvalidRequestError."""
    source = _source()
    while line := source.readline(MAX_TEXT_BYTES + 1):
        yield _decode(line, field).removesuffix("\n").removesuffix("\r")


def _source() -> IO[bytes]:
    """Bytes, because text is UTF-8 here in any locale."""
    buffer: IO[bytes] | None = getattr(sys.stdin, "buffer", None)
    return buffer if buffer is not None else io.BytesIO(sys.stdin.read().encode())


def _decode(data: bytes, field: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise InvalidRequestError(
            field, f"is longer than {MAX_TEXT_BYTES // 1024 // 1024} MiB, the most that a gateway takes"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            field, f"is no UTF-8 text: its byte {error.start} is {data[error.start]:#04x}"
        ) from None
