"""The event loop that a process serves on: uvloop's, and asyncio's own where there is none.

gRPC wakes the loop for every message that it has read or written. In asyncio that turn is Python code; uvloop's is compiled.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def run(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """None has asyncio make its own."""
    try:
        import uvloop
    except ImportError:  # not made for every system
        return None

    class Loop(uvloop.Loop):
        """With asyncio's clock: uvloop's has whole milliseconds, and the same time for all of a turn."""

        def time(self) -> float:
            return time.monotonic()

    return Loop
