"""The live page of a gateway and its JSON, on the HTTP port.

    GET /                        the page: one file, which loads nothing from elsewhere
    GET /api/overview            {"time_ms", "cluster": GetClusterResponse,
                                 "requests": [RequestInfo], "try_box": whether prompts are taken}
    GET /api/timelines/{id}      GetTimelineResponse
    POST /api/try                see gateway/page/try_box.py

No route shows texts.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import asyncio
import base64
import hashlib
import json
import re
import time
from importlib import resources
from typing import TYPE_CHECKING, Any

from gateway.gateway import Gateway
from gateway.page.page_json import json_response, to_json
from gateway.page.try_box import TryBox
from gateway.requests.known_requests import request_info
from gateway.views import cluster_view
from kvrelay.errors import KvrelayError, RequestNotFoundError
from kvrelay.network.http_server import AddRoutes
from kvrelay.state.request_record import RequestSummary

if TYPE_CHECKING:
    from aiohttp import web

PAGE_FILE = "live_page.html"
MAX_REQUESTS = 50
MIN_AGE_S = 0.5
"""Younger overviews are sent again."""


def live_page(gateway: Gateway, try_box: TryBox) -> AddRoutes:
    def add(application: web.Application) -> None:
        page, overview = Page(), Overview(gateway, try_box.is_open)

        async def timeline(request: web.Request) -> web.Response:
            return await _timeline(gateway, request.match_info["request_id"])

        application.router.add_get("/", page.answer)
        application.router.add_get("/api/overview", overview.answer)
        application.router.add_get("/api/timelines/{request_id}", timeline)
        application.router.add_post("/api/try", try_box.answer)

    return add


class Page:
    """The file, with a policy that allows only its own style and script, and no loading."""

    def __init__(self) -> None:
        self.text = resources.files("gateway.page").joinpath(PAGE_FILE).read_text("utf-8")
        self.headers = {
            "Content-Security-Policy": "; ".join(
                (
                    "default-src 'none'",
                    f"script-src '{_digest_of(self.text, 'script')}'",
                    f"style-src '{_digest_of(self.text, 'style')}'",
                    "connect-src 'self'",
                    "img-src data:",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                )
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }

    async def answer(self, request: web.Request) -> web.Response:
        from aiohttp import web

        return web.Response(text=self.text, content_type="text/html", headers=self.headers)


class Overview:
    def __init__(self, gateway: Gateway, has_try_box: bool) -> None:
        self._gateway = gateway
        self._has_try_box = has_try_box
        self._lock = asyncio.Lock()
        self._text = ""
        self._made_at = 0.0

    async def answer(self, request: web.Request) -> web.Response:
        async with self._lock:  # concurrent viewers share one
            if not self._text or time.monotonic() - self._made_at >= MIN_AGE_S:
                self._text = json.dumps(await self._make())
                self._made_at = time.monotonic()
        return json_response(self._text)

    async def _make(self) -> dict[str, Any]:
        cluster = await cluster_view.cluster(self._gateway)
        requests = [to_json(request_info(record)) for record in await self._last_requests()]
        now_ms = int(time.time() * 1000)
        return {"time_ms": now_ms, "cluster": to_json(cluster), "requests": requests, "try_box": self._has_try_box}

    async def _last_requests(self) -> list[RequestSummary]:
        """Of all gateways, newest first."""
        gateway = self._gateway
        own = gateway.known_requests.own()[:MAX_REQUESTS]
        if not gateway.gateways.addresses():
            return own
        known = {record.request_id for record in own}
        page = await gateway.known_requests.read_page(MAX_REQUESTS)
        merged = own + [record for record in page.requests if record.request_id not in known]
        return sorted(merged, key=lambda record: record.create_time_ms, reverse=True)[:MAX_REQUESTS]


async def _timeline(gateway: Gateway, request_id: str) -> web.Response:
    try:
        answer = await gateway.timeline_view.get(request_id, forwarded=False)
    except KvrelayError as error:
        status = 404 if isinstance(error, RequestNotFoundError) else 503
        return json_response(json.dumps({"error": error.message}), status)
    return json_response(json.dumps(to_json(answer)))


def _digest_of(page: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
