"""Waiting for what other processes do: asked again and again, never for longer than a bound."""

import asyncio
from collections.abc import Awaitable, Callable

POLL_INTERVAL_S = 0.01


async def wait_until(condition: Callable[[], Awaitable[bool] | bool], what: str, timeout_s: float = 30.0) -> None:
    """Returns when the condition is true.

    Args:
        condition: a function or a coroutine function.
        what: is waited for, for the error.
        timeout_s: most time.

    Raises:
        AssertionError: it did not become true.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while not await _ask(condition):  # noqa: ASYNC110 - what is asked is in another process
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


async def _ask(condition: Callable[[], Awaitable[bool] | bool]) -> bool:
    answer = condition()
    return answer if isinstance(answer, bool) else await answer
