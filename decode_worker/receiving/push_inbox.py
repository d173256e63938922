"""Reads a push's messages ahead of their use. Runs on the event loop."""

import asyncio
from collections import deque
from typing import Any

import grpc

from kvrelay.errors import CancelledRequestError, TransferError

MAX_READ_AHEAD = 3


class PushInbox:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._messages: deque[bytes] = deque()
        self._has_ended = False
        self._is_closed = False
        self._changed = asyncio.Event()

    async def read(self) -> None:
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                self._messages.append(message)
                self._changed.set()
                while len(self._messages) >= MAX_READ_AHEAD:
                    await self._wait()
        finally:
            self._has_ended = True
            self._changed.set()

    def close(self) -> None:
        """The reservation ended: `take` raises from now on."""
        self._is_closed = True
        self._changed.set()

    @property
    def has_messages(self) -> bool:
        return bool(self._messages)

    async def take(self) -> list[bytes]:
        """Raises CancelledRequestError after `close`, TransferError after the stream's end."""
        while not self._messages and not self._is_closed and not self._has_ended:
            await self._wait()
        if self._is_closed:
            raise CancelledRequestError("the reservation has ended")
        if not self._messages:
            raise TransferError("the push ended without its end message")
        messages = list(self._messages)
        self._messages.clear()
        self._changed.set()
        return messages

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()
