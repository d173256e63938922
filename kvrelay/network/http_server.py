"""The HTTP port of a process: /healthz, and routes of other modules.

Imports aiohttp only for a port, because that slows the start.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING

from kvrelay.network.http_bounds import (
    MAX_BODY_BYTES,
    MAX_HEADERS,
    MAX_LINE_BYTES,
    HostNames,
    HttpBounds,
    bounded,
    check_hosts,
)
from kvrelay.network.http_guard import guarding
from kvrelay.network.https_listener import HttpsListener
from kvrelay.network.listening import bind_sockets
from kvrelay.security.guard import CallGuard

if TYPE_CHECKING:
    from aiohttp import web

AddRoutes = Callable[["web.Application"], None]
"""Called before the start: `application.router.add_get("/path", handler)`."""

SHUTDOWN_TIMEOUT_S = 1.0
"""Most time for running answers at the end. `on_shutdown` ends endless streams."""


class Health(Enum):
    SERVING = "serving"
    DEGRADED = "degraded"
    """Serves, but cannot keep request state."""
    DRAINING = "draining"
    """503, so that load balancers look elsewhere."""

    @classmethod
    def of(cls, *, draining: bool, keeps_state: bool) -> Health:
        if draining:
            return cls.DRAINING
        return cls.SERVING if keeps_state else cls.DEGRADED


@asynccontextmanager
async def serving_http(
    host: str,
    port: int | None,
    health: Callable[[], Health],
    *add_routes: AddRoutes,
    guard: CallGuard | None = None,
    bounds: HttpBounds | None = None,
    health_notes: Callable[[], Mapping[str, object]] = dict,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int | None]:
    """Gives the port. None serves nothing, 0 takes a free one. Without a guard every caller is
    LOCAL, without `tls` it speaks plain text.
    """
    if port is None:
        yield None
        return
    from aiohttp import web

    bounds = bounds or HttpBounds()
    middlewares = [check_hosts(bounds.names or HostNames((host,)))]
    if guard is not None:
        middlewares.append(guarding(guard))
    application = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    _add_health(application, health, health_notes)
    for add in add_routes:
        add(application)
    runner = web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        auto_decompress=False,  # no route takes a packed body, which may be far larger than it looks
        handler_cancellation=True,  # when the client is gone
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        logger=_logger(),
        keepalive_timeout=bounds.silence_timeout_s,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
        max_headers=MAX_HEADERS,
    )
    await runner.setup()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(clean_up, runner)
        yield await listen(runner, bind_sockets(host, port, "--http-port", " for HTTP"), bounds, tls, stack)


async def listen(
    runner: web.AppRunner,
    sockets: Sequence[socket.socket],
    bounds: HttpBounds,
    tls: ssl.SSLContext | None,
    stack: contextlib.AsyncExitStack,
) -> int:
    """Gives the port; the stack's end takes no more connections."""
    server = runner.server
    assert server is not None, "set up"
    if tls is None:
        make, loop = bounded(server, bounds.max_connections), asyncio.get_running_loop()
        for each in sockets:
            stack.callback((await loop.create_server(make, sock=each)).close)
    else:
        listener = HttpsListener(server, tls, bounds.max_connections, bounds.silence_timeout_s)
        stack.push_async_callback(listener.close)
        for each in sockets:
            listener.listen(each)
    return int(sockets[0].getsockname()[1])


async def clean_up(runner: web.AppRunner) -> None:
    with contextlib.suppress(TimeoutError):
        await runner.cleanup()


def _logger() -> logging.Logger:
    """Ignores errors of clients, such as gRPC to the wrong port."""
    logger = logging.getLogger("kvrelay.http")
    logger.filters = [_is_our_defect]
    return logger


def _is_our_defect(record: logging.LogRecord) -> bool:
    from aiohttp.http_exceptions import HttpProcessingError

    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


def _add_health(
    application: web.Application, health: Callable[[], Health], notes: Callable[[], Mapping[str, object]]
) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        state = health()
        status = 503 if state is Health.DRAINING else 200
        fields = {"status": state.value, **notes()}
        return web.Response(text=json.dumps(fields), status=status, content_type="application/json")

    application.router.add_get("/healthz", answer)
