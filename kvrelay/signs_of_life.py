"""Signs of life between a process and its supervisor: datagrams on a Unix socket, as systemd's notify protocol has them.

The process's event loop sends one every second; it hangs when none comes any more, whatever it hangs in. A process that has not
sent its first, for it is still starting, does not count as hung. Knows nothing of what the processes do.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

SEND_INTERVAL_S = 1.0
ALIVE = b"READY=1\nWATCHDOG=1"


@asynccontextmanager
async def showing_life(path: str | None) -> AsyncIterator[None]:
    """Sends signs of life while entered; none when there is no path. `@` begins the name of an abstract socket."""
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
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        while True:
            with contextlib.suppress(OSError):  # nobody listens, or not as fast
                sender.sendto(ALIVE, address)
            await asyncio.sleep(SEND_INTERVAL_S)


class LifeListener(asyncio.DatagramProtocol):
    """The supervisor's end, for one process.

    Args:
        path: of the socket; made here.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._last_sign: float | None = None
        self._transport: asyncio.BaseTransport | None = None

    async def open(self) -> None:
        """Begins to listen."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.bind(self.path)
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=listening)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._last_sign = asyncio.get_running_loop().time()

    def forget(self) -> None:
        """The process was started anew: it counts from its first sign."""
        self._last_sign = None

    async def watch(self, timeout_s: float, on_hung: Callable[[float], None]) -> None:
        """For ever: calls `on_hung` with the seconds of silence whenever they are more than the timeout, then forgets."""
        loop = asyncio.get_running_loop()
        last_look = loop.time()
        while True:
            await asyncio.sleep(timeout_s / 8)
            now = loop.time()
            stood_still = now - last_look > timeout_s / 2  # this process did, and has not read yet what came meanwhile
            last_look = now
            if self._last_sign is None or stood_still:
                continue
            silence_s = now - self._last_sign
            if silence_s > timeout_s:
                self.forget()
                on_hung(silence_s)
