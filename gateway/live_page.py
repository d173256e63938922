"""The live page of a gateway and the JSON behind it, for its HTTP port. Reads only; tells nothing of what requests say.

    GET /                        the page: one file, which loads nothing from elsewhere
    GET /api/overview            cluster and last requests: {"time_ms", "cluster": GetClusterResponse, "requests": [RequestInfo]}
    GET /api/timelines/{id}      one request's timeline: GetTimelineResponse

JSON is that of the protocol's messages, with their own field names. However many look on, an overview is made twice a second.
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

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from gateway import cluster_view
from gateway.relay import Relay
from gateway.timeline_view import get_timeline
from kvrelay.errors import KvrelayError, RequestNotFoundError
from kvrelay.http_server import AddRoutes
from kvrelay.request_record import RequestSummary
from kvrelay.worker_registry import MemberRole

if TYPE_CHECKING:
    from aiohttp import web

PAGE_FILE = "live_page.html"
MAX_REQUESTS = 50
MIN_AGE_S = 0.5
"""How old an overview has to be before another one is made."""


def live_page(relay: Relay) -> AddRoutes:
    """Routes of the page, to be added to a gateway's HTTP server."""

    def add(application: web.Application) -> None:
        page, overview = Page(), Overview(relay)

        async def timeline(request: web.Request) -> web.Response:
            return await _timeline(relay, request.match_info["request_id"])

        application.router.add_get("/", page.answer)
        application.router.add_get("/api/overview", overview.answer)
        application.router.add_get("/api/timelines/{request_id}", timeline)

    return add


class Page:
    """The file as it is, with a policy under which nothing but its own style and script runs, and nothing else is loaded."""

    def __init__(self) -> None:
        self.text = resources.files("gateway").joinpath(PAGE_FILE).read_text("utf-8")
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
    """Cluster and last requests as one document, shared by all who look on."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._lock = asyncio.Lock()
        self._text = ""
        self._made_at = 0.0

    async def answer(self, request: web.Request) -> web.Response:
        async with self._lock:  # who comes while one is made gets that one
            if not self._text or time.monotonic() - self._made_at >= MIN_AGE_S:
                self._text = json.dumps(await self._make())
                self._made_at = time.monotonic()
        return _json(self._text)

    async def _make(self) -> dict[str, Any]:
        cluster = await cluster_view.cluster(self._relay)
        requests = [to_json(cluster_view.request_info(record)) for record in await self._last_requests()]
        return {"time_ms": int(time.time() * 1000), "cluster": to_json(cluster), "requests": requests}

    async def _last_requests(self) -> list[RequestSummary]:
        """This gateway's as it knows them, others' as far as the store does; newest first."""
        relay = self._relay
        own: list[RequestSummary] = [runner.journal.record for runner in relay.requests.known()[:MAX_REQUESTS]]
        if len(relay.members(MemberRole.GATEWAY)) < 2:
            return own
        known = {record.request_id for record in own}
        page = await cluster_view.list_requests(relay, MAX_REQUESTS, "", False)
        merged = own + [record for record in page.requests if record.request_id not in known]
        return sorted(merged, key=lambda record: record.create_time_ms, reverse=True)[:MAX_REQUESTS]


async def _timeline(relay: Relay, request_id: str) -> web.Response:
    try:
        answer = await get_timeline(relay, request_id, forwarded=False)
    except KvrelayError as error:
        status = 404 if isinstance(error, RequestNotFoundError) else 503
        return _json(json.dumps({"error": error.message}), status)
    return _json(json.dumps(to_json(answer)))


def to_json(message: Message) -> dict[str, Any]:
    """A message of the protocol as JSON has it, with all fields that have a value or a default."""
    fields: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return fields


def _json(text: str, status: int = 200) -> web.Response:
    from aiohttp import web

    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


def _digest_of(page: str, tag: str) -> str:
    """What a policy calls the page's one element of that name."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
