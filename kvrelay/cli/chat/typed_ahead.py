"""Collects the keys that a person types while an answer is printed."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MAX_BYTES = 64 * 1024
_END_OF_INPUT = "\x04"  # Ctrl-D
_ERASE = ("\x7f", "\b")
_ESCAPE = "\x1b"


class TypedAhead:
    """`is_end`: Ctrl-D came on an empty line. Set when the block is left."""

    def __init__(self) -> None:
        self.text = ""
        self.is_end = False

    def take(self, keys: str) -> None:
        """Parses a terminal's keys. Erasing works; arrows and the like are dropped."""
        typed: list[str] = []
        position = 0
        while position < len(keys):
            key = keys[position]
            if key == _ESCAPE:
                position += _length_of_escape(keys[position:])
                continue
            if key in _ERASE:
                del typed[-1:]
            elif key in "\r\n":
                typed.append("\n")
            elif key == "\t" or key.isprintable():
                typed.append(key)
            position += 1
        self.text = "".join(typed).strip("\n")
        self.is_end = not self.text and _END_OF_INPUT in keys


@contextmanager
def typed_ahead() -> Iterator[TypedAhead]:
    """Hides keys. Does nothing if standard input is no terminal."""
    typed = TypedAhead()
    if not sys.stdin.isatty():
        yield typed
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = termios.tcgetattr(terminal)
    # Without ICANON keys are readable before a line end. ISIG stays: Ctrl-C is a signal.
    silent[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield typed
    finally:
        try:
            typed.take(_read_waiting(terminal))
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)


def _read_waiting(terminal: int) -> str:
    """At most 64 KiB."""
    keys = b""
    while len(keys) < _MAX_BYTES and select.select([terminal], [], [], 0)[0]:
        read = os.read(terminal, 4096)
        if not read:
            break
        keys += read
    return keys.decode("utf-8", errors="ignore")


def _length_of_escape(keys: str) -> int:
    """Of ESC [ 1 ; 5 C for instance, ESC O A, or ESC and a letter."""
    if len(keys) < 2:
        return 1
    if keys[1] == "O":
        return 3
    if keys[1] != "[":
        return 2
    length = 2
    while length < len(keys) and not "@" <= keys[length] <= "~":
        length += 1
    return length + 1
