"""Restarts a process with back-off whenever it ends by itself."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

from kvrelay.core.backoff import Backoff
from kvrelay.errors import StartupError
from kvrelay.runtime.child_process import LineSink

_RESTART_INITIAL_S = 0.5
_RESTART_MAXIMUM_S = 30.0
_HEALTHY_AFTER_S = 30.0
"""A longer run resets the back-off."""


async def keep_running(
    name: str, wait: Callable[[], Awaitable[int]], start_again: Callable[[], Awaitable[None]], on_line: LineSink
) -> None:
    """Runs until cancelled, and retries failed starts. `wait` returns a run's exit code."""
    clock = asyncio.get_running_loop().time
    backoff = Backoff(_RESTART_INITIAL_S, _RESTART_MAXIMUM_S, random.random)
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
    return f"with code {exit_code}" if exit_code >= 0 else f"by {signal.Signals(-exit_code).name}"
