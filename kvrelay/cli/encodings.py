"""The command line where the system's encoding is not UTF-8.

Output gets escapes for what it cannot encode (LC_ALL=C). ASCII input is read as UTF-8.
"""

import codecs
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO


def prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and _name_of(sys.stdin) == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def decoded_arguments(arguments: Sequence[str]) -> list[str]:
    """Undoes Python's escapes of bytes outside the system's encoding."""
    return [_decoded(argument) for argument in arguments]


def writes_all_characters(stream: TextIO) -> bool:
    return _name_of(stream).startswith(("utf-8", "utf-16", "utf-32"))


def _decoded(argument: str) -> str:
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates are escaped bytes
        return os.fsencode(argument).decode("utf-8", "surrogateescape")
    return argument


def _name_of(stream: TextIO) -> str:
    try:
        return codecs.lookup(stream.encoding or "").name
    except LookupError:
        return ""
