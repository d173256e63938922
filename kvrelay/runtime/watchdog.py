"""Signs of life to a supervisor, one per second, as in systemd's notify protocol."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SEND_INTERVAL_S = 1.0
ALIVE = b"READY=1\nWATCHDOG=1"


@asynccontextmanager
async def send_keepalives(path: str | None) -> AsyncIterator[None]:
    """Sends while entered. `@` begins the name of an abstract socket."""
    if path is None:
        yield
        return
    sending = asyncio.create_task(_keep_sending(path), name="signs of life")
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.wait([sending])


async def _keep_sending(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        while True:
            with contextlib.suppress(OSError):  # no listener, or a slow one
                sender.sendto(ALIVE, _address_of(path))
            await asyncio.sleep(SEND_INTERVAL_S)


def _address_of(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


class WatchdogListener(asyncio.DatagramProtocol):
    """The supervisor's end, for one process. A process that has not sent its first sign is not
    hung.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._last_sign: float | None = None
        self._transport: asyncio.BaseTransport | None = None

    async def open(self) -> None:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.bind(_address_of(self.path))
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=listening)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._last_sign = asyncio.get_running_loop().time()

    def forget(self) -> None:
        self._last_sign = None

    async def watch(self, timeout_s: float, on_hung: Callable[[float], None]) -> None:
        loop = asyncio.get_running_loop()
        last_look = loop.time()
        while True:
            await asyncio.sleep(timeout_s / 8)
            now = loop.time()
            # After a pause of this process, unread signs may be waiting.
            stood_still = now - last_look > timeout_s / 2
            last_look = now
            if self._last_sign is None or stood_still:
                continue
            silence_s = now - self._last_sign
            if silence_s > timeout_s:
                self.forget()
                on_hung(silence_s)
