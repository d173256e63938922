"""A TCP proxy that harms links: delays, slows, holds, cuts, flips a bit, closes.

    gateway ---+                                 a link is known by who connects:
    prefill-0 -+--> proxy of decode-0 --> decode-0      proxy.link("prefill-0").to_target.cut_at(1000)

Held bytes arrive when the link heals. All proxies share a thread, so that a busy test does not
delay them.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

READ_BYTES = 64 * 1024
TLS_HANDSHAKE = 0x16
"""First byte of a connection with TLS."""
CONNECT_TIMEOUT_S = 5.0
HOLD_POLL_S = 0.002

ResultT = TypeVar("ResultT")

FindSource = Callable[[int], Awaitable[str]]
"""Names the process that connects from a local port."""


@dataclass(slots=True)
class CutRecord:
    kind: str
    """cut, flip, hold or close."""
    at_byte: int
    """Bytes passed since the command."""
    time_s: float


class Direction:
    """One direction of a link, over all its connections."""

    def __init__(self) -> None:
        self.latency_s = 0.0
        self.bytes_per_s: float | None = None
        self.num_bytes = 0
        """Passed since the start, or the last cut_at or flip_at."""
        self.records: list[CutRecord] = []
        self._cut_at: int | None = None
        self._flip_at: int | None = None
        self._is_held = False

    def cut_at(self, byte: int) -> None:
        """Passes this many bytes, then resets the connection that sends more."""
        self.num_bytes, self._cut_at = 0, byte

    def flip_at(self, byte: int) -> None:
        """Flips the lowest bit of that byte, counted from now, once."""
        self.num_bytes, self._flip_at = 0, byte

    def hold(self) -> None:
        """Passes nothing, not even the end of a connection, until `release`."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False

    def heal(self) -> None:
        self.latency_s, self.bytes_per_s, self._cut_at, self._flip_at = 0.0, None, None, None
        self.release()

    async def wait_open(self) -> None:
        if self._is_held:
            self._record("hold")
        while self._is_held:  # noqa: ASYNC110 - it is set in another thread
            await asyncio.sleep(HOLD_POLL_S)

    async def take(self, data: bytes) -> tuple[bytes, bool]:
        """Returns the bytes to pass on, and whether to cut the connection after them."""
        await self.wait_open()
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.bytes_per_s:
            await asyncio.sleep(len(data) / self.bytes_per_s)
        begin, end = self.num_bytes, self.num_bytes + len(data)
        cut = self._cut_at is not None and end > self._cut_at
        if cut:
            assert self._cut_at is not None
            data, end, self._cut_at = data[: self._cut_at - begin], self._cut_at, None
        if self._flip_at is not None and begin <= self._flip_at < end:
            place, self._flip_at = self._flip_at - begin, None
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            self._record("flip", begin + place)
        self.num_bytes = end
        if cut:
            self._record("cut")
        return data, cut

    def _record(self, kind: str, at_byte: int | None = None) -> None:
        self.records.append(CutRecord(kind, self.num_bytes if at_byte is None else at_byte, time.monotonic()))

    def count(self, kind: str) -> int:
        return sum(record.kind == kind for record in self.records)


@dataclass(slots=True)
class Link:
    """All between one process and the one behind the proxy."""

    source: str
    to_target: Direction = field(default_factory=Direction)
    to_source: Direction = field(default_factory=Direction)
    num_connections: int = 0
    num_plain: int = 0
    """Connections that did not begin with a TLS handshake."""
    _transports: set[asyncio.WriteTransport] = field(default_factory=set)

    @property
    def num_open(self) -> int:
        return len(self._transports) // 2

    def note_first(self, data: bytes) -> None:
        self.num_plain += data[0] != TLS_HANDSHAKE

    def blackhole(self) -> None:
        """Silences both directions, for new connections too."""
        self.to_target.hold()
        self.to_source.hold()

    def heal(self) -> None:
        """Ends every fault of the link."""
        self.to_target.heal()
        self.to_source.heal()

    def close(self) -> int:
        """Resets all connections; returns their number."""
        transports = list(self._transports)
        for transport in transports:
            _PROXY_THREAD.loop.call_soon_threadsafe(transport.abort)
        if transports:
            self.to_target._record("close")
        return len(transports)


async def _unnamed(port: int) -> str:
    return ""


class FaultProxy:
    """Listens in front of a target, which need not exist yet. `find_source` names a connection's
    link.
    """

    def __init__(self, host: str, port: int, find_source: FindSource = _unnamed) -> None:
        self._host = host
        self.port_of_target = port
        self._find_source = find_source
        self._links: dict[str, Link] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """host:port; only after `start`."""
        return f"127.0.0.1:{self.port}"

    def link(self, source: str = "") -> Link:
        """The link from a source, which may connect later."""
        if source not in self._links:
            self._links[source] = Link(source)
        return self._links[source]

    def links(self) -> list[Link]:
        return list(self._links.values())

    def heal(self) -> None:
        """Ends every fault of all links."""
        for link in self._links.values():
            link.heal()

    async def start(self) -> None:
        await _PROXY_THREAD.run(self._start())

    async def stop(self) -> None:
        """Idempotent."""
        await _PROXY_THREAD.run(self._stop())

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._connect(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        source_port = int(writer.get_extra_info("peername")[1])
        link = self.link(await self._find_source(source_port))
        link.num_connections += 1
        await link.to_target.wait_open()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            target_reader, target_writer = await asyncio.open_connection(self._host, self.port_of_target)
        for each in (writer, target_writer):
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transports = {writer.transport, target_writer.transport}
        link._transports |= transports
        pumps = [
            asyncio.create_task(
                _pump(reader, target_writer, link.to_target, link.note_first), name=f"proxy from {link.source}"
            ),
            asyncio.create_task(_pump(target_reader, writer, link.to_source), name=f"proxy to {link.source}"),
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            # One side ended in order: the other side's rest is passed on.
            if not any(pump.result() for pump in done):
                await asyncio.wait(pumps, timeout=CONNECT_TIMEOUT_S)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            link._transports -= transports
            target_writer.transport.abort()


class _ProxyThread:
    """The event loop of all proxies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="fault proxies", daemon=True).start()
            return self._loop

    async def run(self, job: Coroutine[Any, Any, ResultT]) -> ResultT:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(job, self.loop))


_PROXY_THREAD = _ProxyThread()


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    direction: Direction,
    on_first: Callable[[bytes], None] | None = None,
) -> bool:
    """True when the other side must be reset."""
    try:
        while data := await reader.read(READ_BYTES):
            if on_first is not None:
                on_first(data)
                on_first = None
            passed, cut = await direction.take(data)
            writer.write(passed)
            if cut:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await writer.drain()
                return True
            await writer.drain()
        await direction.wait_open()
        if writer.can_write_eof():
            writer.write_eof()
    except ConnectionError:
        await direction.wait_open()
        return True
    return False
