"""Named timers of one request."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

ArgumentT = TypeVar("ArgumentT")


class RequestTimers:
    """Refers to its request only while a timer runs, so that dropped requests are freed."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._timers

    def set(self, name: str, delay_s: float, post: Callable[[ArgumentT], None], event: ArgumentT) -> None:
        """Starts or restarts a timer that posts the event."""
        self.drop(name)
        self._timers[name] = self._loop.call_later(delay_s, self._fire, name, post, event)

    def drop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def drop_all(self) -> None:
        for name in list(self._timers):
            self.drop(name)

    def _fire(self, name: str, post: Callable[[ArgumentT], None], event: ArgumentT) -> None:
        self._timers.pop(name, None)
        post(event)
