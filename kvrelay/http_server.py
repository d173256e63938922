"""The HTTP port of a process: /healthz, and whatever routes others add to it. Knows nothing of what they answer.

aiohttp is imported when a port is asked for, and not before: a process without one starts no slower for it.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING

from kvrelay.errors import StartupError

if TYPE_CHECKING:
    from aiohttp import web

AddRoutes = Callable[["web.Application"], None]
"""Adds routes to the application before it starts: `application.router.add_get("/path", handler)`."""

SHUTDOWN_TIMEOUT_S = 1.0
"""How long answers that are under way may take when the process ends. Streams that never end hear of it by `on_shutdown`."""


class Health(Enum):
    """What /healthz answers; all but DRAINING with status 200."""

    SERVING = "serving"
    DEGRADED = "degraded"
    """Serves, but request state cannot be kept."""
    DRAINING = "draining"
    """Takes no new work: 503, so that load balancers look elsewhere."""


@asynccontextmanager
async def serving_http(
    host: str, port: int | None, health: Callable[[], Health], *add_routes: AddRoutes
) -> AsyncIterator[int | None]:
    """Serves HTTP within the block, on the running loop; gives the port that it listens on.

    Args:
        host: to listen on.
        port: to listen on; 0 takes a free one, None serves nothing.
        health: asked at each /healthz.
        add_routes: called in order with the `aiohttp.web.Application`.

    Raises:
        StartupError: the port is taken, or the host is not this machine's.
    """
    if port is None:
        yield None
        return
    from aiohttp import web

    application = web.Application()
    _add_health(application, health)
    for add in add_routes:
        add(application)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    try:
        yield await _listen(runner, host, port)
    finally:
        with contextlib.suppress(TimeoutError):
            await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> int:
    from aiohttp import web

    try:
        await web.TCPSite(runner, host.strip("[]"), port, reuse_address=True).start()
    except OSError as error:
        message = f"cannot listen on {host}:{port} for HTTP: {error.strerror}. Free the port, or choose another with --http-port"
        raise StartupError(message) from error
    bound_port: int = runner.addresses[0][1]
    return bound_port


def _add_health(application: web.Application, health: Callable[[], Health]) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        state = health()
        status = 503 if state is Health.DRAINING else 200
        return web.Response(text=json.dumps({"status": state.value}), status=status, content_type="application/json")

    application.router.add_get("/healthz", answer)
