"""Accepts the connections of an HTTPS port. Those that are in their handshake count, too."""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from aiohttp import web

BACKLOG = 128
SHUTDOWN_TIMEOUT_S = 1.0
PAUSE_S = 1.0
"""After a failure to accept, such as for lack of file descriptors."""

_log = structlog.get_logger(__name__)


class HttpsListener:
    """asyncio's own servers tell of a connection after its handshake, so any number could begin one."""

    def __init__(self, server: web.Server, context: ssl.SSLContext, max_connections: int, timeout_s: float) -> None:
        """`timeout_s`: most time of a handshake."""
        self._server = server
        self._context = context
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._listening: list[socket.socket] = []
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}
        self._loop = asyncio.get_running_loop()

    def listen(self, listening: socket.socket) -> None:
        """The socket is bound, and this object's from now on."""
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._listening.append(listening)
        self._loop.add_reader(listening, self._accept, listening)

    async def close(self) -> None:
        """Open connections stay."""
        while self._listening:
            listening = self._listening.pop()
            self._loop.remove_reader(listening)
            listening.close()
        for connection in self._handshakes.values():
            with contextlib.suppress(OSError):  # the caller is gone
                connection.shutdown(socket.SHUT_RDWR)  # uvloop keeps the socket of a cancelled handshake
        if self._handshakes:
            await asyncio.wait(self._handshakes, timeout=SHUTDOWN_TIMEOUT_S)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the caller is gone
            return
        except OSError as failure:
            _log.error("the HTTPS port cannot accept connections", problem=failure.strerror)
            self._loop.remove_reader(listening)
            self._loop.call_later(PAUSE_S, self._accept_again, listening)
            return
        if len(self._server.connections) + len(self._handshakes) >= self._max_connections:
            connection.close()
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._shake_hands(connection), name="HTTPS handshake")
        self._handshakes[task] = connection
        task.add_done_callback(self._ended)

    def _accept_again(self, listening: socket.socket) -> None:
        if listening in self._listening:
            self._loop.add_reader(listening, self._accept, listening)

    async def _shake_hands(self, connection: socket.socket) -> None:
        await self._loop.connect_accepted_socket(
            self._server,
            connection,
            ssl=self._context,
            ssl_handshake_timeout=self._timeout_s,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )

    def _ended(self, task: asyncio.Task[None]) -> None:
        connection = self._handshakes.pop(task)
        if task.cancelled() or task.exception() is not None:
            connection.close()
