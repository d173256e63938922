"""Reads a line that a person types at a prompt."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WAKE_INTERVAL_S = 0.2


class LineInterrupted(KeyboardInterrupt):
    """Ctrl-C on a line that is not empty."""


def read_typed_line(prompt: str, prefill: str = "") -> str:
    """Reads a line with editing and history. Main thread only, because of signals.

    Pasted text keeps its line ends if the terminal marks it as pasted.

    Raises:
        EOFError: Ctrl-D on an empty line.
        LineInterrupted, KeyboardInterrupt: Ctrl-C on a line with text, or without.
    """
    # input() has no editing here, and would write its prompt among the answers.
    if not sys.stdout.isatty():
        return _read_plain_line(prompt)
    import readline  # gives input() its editing and history

    if "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM", "dumb") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")
    if prefill:
        readline.set_startup_hook(lambda: readline.insert_text(prefill))
    try:
        with _woken_now_and_then():
            return input(prompt)
    except KeyboardInterrupt:
        if readline.get_line_buffer():
            raise LineInterrupted from None
        raise
    finally:
        readline.set_startup_hook()


def _read_plain_line(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


@contextmanager
def _woken_now_and_then() -> Iterator[None]:
    """Notices a Ctrl-C that came before readline's wait.

    Readline checks for pending signals only when another one interrupts it.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _WAKE_INTERVAL_S, _WAKE_INTERVAL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
