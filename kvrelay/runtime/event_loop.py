"""uvloop's event loop, or asyncio's where there is none.

gRPC wakes the loop for every message: in asyncio that turn is Python code.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def run(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *arguments: object) -> None:
    """May be called from any thread. A closed loop ignores it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback, *arguments)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not available on every system
        return None

    class Loop(uvloop.Loop):
        """uvloop's clock has whole milliseconds, and one time per turn."""

        def time(self) -> float:
            return time.monotonic()

    return Loop
