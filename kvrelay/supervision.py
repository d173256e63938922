"""Keeps a process running: starts it again, with back-off, whenever it ends by itself. Knows nothing of what it runs."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

from kvrelay.backoff import Backoff
from kvrelay.child_process import LineSink
from kvrelay.errors import StartupError

_RESTART_INITIAL_S = 0.5
_RESTART_MAXIMUM_S = 30.0
_HEALTHY_AFTER_S = 30.0
"""A process that ran for so long starts its back-off anew."""


async def keep_running(
    name: str, wait: Callable[[], Awaitable[int]], start_again: Callable[[], Awaitable[None]], on_line: LineSink
) -> None:
    """For ever; cancel it to stop. What goes wrong with a start is said and tried again.

    Args:
        name: of the process, for `on_line`.
        wait: waits for the end of the current run; its exit code.
        start_again: begins the next run.
        on_line: gets a line for every end.
    """
    clock = asyncio.get_running_loop().time
    backoff = Backoff(_RESTART_INITIAL_S, _RESTART_MAXIMUM_S)
    started_at_s = clock()
    while True:
        ending = f"ended {describe_exit(await wait())}"
        if clock() - started_at_s > _HEALTHY_AFTER_S:
            backoff.reset()
        while ending:
            delay_s = backoff.next_delay_s()
            on_line(name, f"{ending}; starting again in {delay_s:.1f} s")
            await asyncio.sleep(delay_s)
            try:
                await start_again()
                ending = ""
            except (OSError, StartupError) as failure:
                ending = f"cannot be started ({failure})"
        started_at_s = clock()


def describe_exit(exit_code: int) -> str:
    """An exit code in words; negative is the signal that ended the process."""
    return f"with code {exit_code}" if exit_code >= 0 else f"by {signal.Signals(-exit_code).name}"
