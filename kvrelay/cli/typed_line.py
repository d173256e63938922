"""A line that a person types at a prompt. Knows nothing of what it is for."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_WAKE_INTERVAL_S = 0.2


def read_typed_line(prompt: str) -> str:
    """One line from the terminal, with editing and history. To be called in the main thread, where Python hears signals.

    Raises:
        EOFError: Ctrl-D on an empty line.
        KeyboardInterrupt: Ctrl-C.
    """
    import readline  # noqa: F401  # gives input() its editing and history

    with _woken_now_and_then():
        return input(prompt)


@contextmanager
def _woken_now_and_then() -> Iterator[None]:
    """Lets a Ctrl-C be heard that came when the prompt was shown, but readline did not wait yet.

    Its wait does not look for what came before; only a signal that comes while it lasts ends it, and then all are looked for.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _WAKE_INTERVAL_S, _WAKE_INTERVAL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
