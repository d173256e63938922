"""Polls conditions of other processes, within a bound."""

import asyncio
from collections.abc import Awaitable, Callable

POLL_INTERVAL_S = 0.01


async def wait_until(condition: Callable[[], Awaitable[bool] | bool], what: str, timeout_s: float = 30.0) -> None:
    """Returns when the condition is true; AssertionError says `what` did not happen in time."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await _ask(condition):  # noqa: ASYNC110 - what is asked is in another process
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


async def _ask(condition: Callable[[], Awaitable[bool] | bool]) -> bool:
    answer = condition()
    return answer if isinstance(answer, bool) else await answer
