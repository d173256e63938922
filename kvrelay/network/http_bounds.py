"""Who may ask an HTTP port, and how much of it: the Host header, connections, sizes.

A browser sends requests for any page, also to the user's own machine. `Host` has the name that the
page was loaded under, so a foreign one shows DNS rebinding.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvrelay.core.quoting import quoted
from kvrelay.network.host_port import split_host_port

if TYPE_CHECKING:
    from aiohttp import web

ANY_NAME = "*"
MAX_CONNECTIONS = 256
SILENCE_TIMEOUT_S = 10.0
"""For a request's head, and between requests of a connection."""
MAX_BODY_BYTES = 64 * 1024
MAX_LINE_BYTES = 8190
MAX_HEADERS = 64


class HostNames:
    """Names under which a port may be asked, besides addresses and names without a dot.

    `own`: names as in `Host`, without ports; ".example.org" stands for all names below it, "*" for
    all. `option` adds some.
    """

    def __init__(self, own: Collection[str] = (), option: str = "--http-allowed-hosts") -> None:
        self._option = option
        names = {name.strip().lower().removesuffix(".").removeprefix("*") or ANY_NAME for name in own if name.strip()}
        self._takes_all = ANY_NAME in names
        self._names = {name for name in names if not name.startswith(".")}
        self._suffixes = tuple(name for name in names if name.startswith("."))

    def problem(self, hosts: list[str]) -> str:
        """Empty if these values of `Host` may ask."""
        if self._takes_all:
            return ""
        try:
            host, _ = split_host_port(hosts[0] if len(hosts) == 1 else "")
        except ValueError:
            return "the Host header names no host; send the one that was asked for"
        host = host.lower().removesuffix(".")
        # A name without a dot cannot be registered: it is this network's own.
        if "." not in host or host in self._names or host.endswith(self._suffixes) or _is_address(host):
            return ""
        return f"{quoted(host)} is no name of this process: use its address or localhost, or add the name to {self._option}"


@dataclass(frozen=True, slots=True)
class HttpBounds:
    names: HostNames | None = None
    """None: the host that is listened on."""
    max_connections: int = MAX_CONNECTIONS
    silence_timeout_s: float = SILENCE_TIMEOUT_S


def check_hosts(names: HostNames) -> Any:
    """Answers 403 under a foreign name. Without `Host`, which browsers always send, all may ask."""
    from aiohttp import web

    @web.middleware
    async def check(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])
        if hosts and (problem := names.problem(hosts)):
            fields = {"error": problem, "reason": "HOST_REFUSED", "code": "PERMISSION_DENIED"}
            return web.Response(text=json.dumps(fields), status=403, content_type="application/json")
        return await handler(request)

    return check


def bounded(server: web.Server, max_connections: int) -> Callable[[], asyncio.BaseProtocol]:
    """Makes the protocols of new connections. Those above the bound are closed at once."""

    def make() -> asyncio.BaseProtocol:
        return server() if len(server.connections) < max_connections else _Closed()

    return make


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
