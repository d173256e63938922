"""The HTTP server for clients of OpenAI's API. Checks keys, paths and fields, and forwards to smg.

    client ── HTTP ──▶ front ── HTTP on loopback ──▶ smg ── VllmEngine ──▶ gateway

It forwards only the API's own routes, because smg's control plane can add workers.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import structlog
from aiohttp import web

from kvrelay.errors import AccessDeniedError, OverloadedError, UnauthenticatedError
from kvrelay.network.http_bounds import HostNames
from kvrelay.openai_frontend.open_requests import FRONT_ITSELF, Client, OpenRequests
from kvrelay.openai_frontend.readiness import has_model
from kvrelay.openai_frontend.request_fields import Body, RefusedFieldError, check_fields
from kvrelay.openai_frontend.shared_bound import SharedBound
from kvrelay.openai_frontend.token_bytes import mend_entries
from kvrelay.security.guard import CallGuard, bearer_of
from kvrelay.security.method_rules import OPENAI_ROUTES
from kvrelay.security.role_names import auth_context_of

MAX_UNREAD_BODY_BYTES = 64 * 1024 * 1024
"""Of all bodies that are being read; more are refused before reading."""
BODY_TIMEOUT_S = 30.0
MAX_REQUESTS = 1024
"""The gateway's limit (--max-running-requests) is lower by default and applies first."""
MAX_EVENT_BYTES = 4 * 1024 * 1024
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 3600.0
"""The gateway ends requests sooner: --default-timeout-ms."""

_PASSED_HEADERS = ("Content-Type", "Retry-After", "X-Request-Id", "Cache-Control")

_log = structlog.get_logger(__name__)


class OpenAIFront:
    """One front before one smg.

    Args:
        upstream: smg's URL, without a path.
        keys: clients must send one of them, if there are any.
        guard: knows further keys, and whose they are.
        names: under which it may be asked without a key.
    """

    def __init__(
        self,
        upstream: str,
        keys: Collection[str],
        upstream_key: str,
        max_body_bytes: int,
        guard: CallGuard | None = None,
        names: HostNames | None = None,
    ) -> None:
        self.requests = OpenRequests()
        self._upstream = upstream
        self._keys = [key.encode() for key in keys]
        self._headers = {"Authorization": f"Bearer {upstream_key}", "Accept-Encoding": "identity"}
        self._session: aiohttp.ClientSession | None = None
        self._guard = guard
        self._names = names or HostNames()
        self._max_body_bytes = max_body_bytes
        self._places = SharedBound()
        self._unread_bytes = SharedBound()

    def application(self) -> web.Application:
        """Opens and closes the connections to smg."""
        application = web.Application(client_max_size=self._max_body_bytes, middlewares=[_errors_as_openai_has_them])
        for method, path in OPENAI_ROUTES:
            application.router.add_route(method, f"/v1/{path}", self._pass_on)
        application.router.add_get("/health", self._ready)
        application.router.add_get("/readiness", self._ready)
        application.cleanup_ctx.append(self._connections)
        return application

    async def is_ready(self) -> bool:
        """Whether smg has a gateway and its tokenizer."""
        return await has_model(self._connected, self._upstream, self._headers)

    async def _connections(self, application: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)  # bounded by the number of requests
        # No proxy: smg is on this machine.
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:
            self._session = session
            yield
            self._session = None

    async def _ready(self, request: web.Request) -> web.Response:
        ready = await self.is_ready()
        return web.json_response({"status": "ready" if ready else "not ready"}, status=200 if ready else 503)

    @property
    def _connected(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the application has started"
        return self._session

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        endpoint = request.path.removeprefix("/v1/")
        async with self._authorized(request) as client, self._place(client):
            body = await self._read_body(request, client) if request.method == "POST" else None
            if body is not None:
                body = check_fields(endpoint, body)
            with self.requests.of(client, endpoint) as request_id:
                return await self._ask_smg(request, body, request_id)

    async def _ask_smg(self, request: web.Request, body: Body | None, request_id: str) -> web.StreamResponse:
        data = None if body is None else json.dumps(body)
        headers = {**self._headers, "Content-Type": "application/json", "X-Request-Id": request_id}
        async with self._connected.request(
            request.method, self._upstream + request.path_qs, data=data, headers=headers
        ) as answer:
            mends = bool(body and body.get("logprobs")) and answer.status == 200
            if answer.content_type == "text/event-stream":
                return await _stream(request, answer, mends)
            return await _whole(answer, mends)

    async def _read_body(self, request: web.Request, client: Client) -> Body:
        """Refuses long bodies by their announced length, before reading."""
        length = self._max_body_bytes if request.content_length is None else request.content_length
        if length > self._max_body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_body_bytes, length)
        full = "too many bodies are being read, or too many of yours; try again later"
        with self._unread_bytes.taking(length, client.tenant, MAX_UNREAD_BODY_BYTES, full):
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    return _parsed(await request.read())
            except TimeoutError:
                raise _error(408, f"the body did not come within {BODY_TIMEOUT_S:g} s", "request_timeout") from None

    @asynccontextmanager
    async def _authorized(self, request: web.Request) -> AsyncIterator[Client]:
        """Ends the block when the key is withdrawn."""
        is_open = not self._keys and self._guard is None
        if is_open:
            self._check_host(request)
        if is_open or self._has_static_key(request):
            yield FRONT_ITSELF
            return
        if self._guard is None:
            raise _wrong_key()
        resource = request.match_info.route.resource
        route = f"{request.method} {resource.canonical if resource is not None else request.path}"
        metadata = [("authorization", value) for value in request.headers.getall("Authorization", [])]
        try:
            certificate = auth_context_of(request.get_extra_info("peercert"))
            principal = self._guard.check(route, metadata, certificate, request.remote or "")
            with self._guard.following(principal):
                yield Client(principal.tenant, bearer_of(metadata))
        except UnauthenticatedError:
            raise _wrong_key() from None
        except AccessDeniedError as refusal:
            raise _error(403, refusal.message, "permission_denied") from None

    def _check_host(self, request: web.Request) -> None:
        """A web page of a foreign name could ask with its reader's rights; it has no key."""
        hosts = request.headers.getall("Host", [])
        if hosts and (problem := self._names.problem(hosts)):
            raise _error(403, problem, "host_refused")

    def _has_static_key(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        # Compares all, so that the time reveals nothing.
        return sum(hmac.compare_digest(given, known) for known in self._keys) > 0

    @asynccontextmanager
    async def _place(self, client: Client) -> AsyncIterator[None]:
        full = f"{MAX_REQUESTS} requests are in progress, or half as many of yours; try again later"
        with self._places.taking(1, client.tenant, MAX_REQUESTS, full):
            yield


def _wrong_key() -> "_OpenAIError":
    message = "Incorrect API key provided: send one of this server's keys as a bearer token"
    return _error(401, message, "invalid_api_key")


def _parsed(data: bytes) -> Body:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _error(400, "The body is no JSON: send an object as OpenAI's API has it", "invalid_json") from None
    if not isinstance(body, dict):
        raise _error(400, "The body must be a JSON object", "invalid_json")
    return body


async def _whole(answer: aiohttp.ClientResponse, mends: bool) -> web.Response:
    data = await answer.read()
    if mends:
        document = json.loads(data)
        for choice in document.get("choices", ()):
            _mend(choice, choice.get("message"))
        data = json.dumps(document, ensure_ascii=False).encode()
    return web.Response(body=data, status=answer.status, headers=_headers_of(answer))


async def _stream(request: web.Request, answer: aiohttp.ClientResponse, mends: bool) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=_headers_of(answer))
    await response.prepare(request)
    if not mends:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    else:
        async for event in _events(answer):
            await response.write(_mended_event(event))
    await response.write_eof()
    return response


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yields whole events with their final empty line, then the rest."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield event + b"\n\n"
        if len(rest) > MAX_EVENT_BYTES:
            raise _error(502, "smg sent an event without an end", "bad_gateway")
    if rest:
        yield rest


def _mended_event(event: bytes) -> bytes:
    if not event.startswith(b"data: {"):
        return event
    document = json.loads(event.removeprefix(b"data: "))
    for choice in document.get("choices", ()):
        _mend(choice, choice.get("delta"))
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def _mend(choice: dict[str, Any], message: Any) -> None:
    entries = (choice.get("logprobs") or {}).get("content")
    if entries:
        mend_entries(entries, (message or {}).get("content") or "")


def _headers_of(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: answer.headers[name] for name in _PASSED_HEADERS if name in answer.headers}


@web.middleware
async def _errors_as_openai_has_them(request: web.Request, handler: Any) -> web.StreamResponse:
    """Covers aiohttp's own errors too."""
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except RefusedFieldError as refused:
        return _response(_error(400, str(refused), "invalid_value", param=refused.name))
    except _OpenAIError as error:
        return _response(error)
    except OverloadedError as full:
        return _response(_error(429, full.message, "rate_limit_exceeded"))
    except web.HTTPNotFound:
        message = f"{request.path[:200]} is not served here; see the OpenAI part of docs/guides/clients.md"
        return _response(_error(404, message, "unknown_url"))
    except web.HTTPMethodNotAllowed as error:
        return _response(
            _error(405, f"{request.method} is not allowed here; use {', '.join(error.allowed_methods)}", "bad_method")
        )
    except web.HTTPRequestEntityTooLarge:
        message = "The body is longer than this server takes (--openai-max-body-kib); send less"
        return _response(_error(413, message, "too_large"))
    except aiohttp.ClientConnectionResetError:
        raise  # the client hung up
    except (aiohttp.ClientError, TimeoutError) as failure:
        _log.warning("smg does not answer", cause=type(failure).__name__)
        return _response(_error(503, "The server behind this port does not answer; try again", "unavailable"))


class _OpenAIError(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(body["message"])
        self.status = status
        self.body = body


def _error(status: int, message: str, code: str, param: str | None = None) -> _OpenAIError:
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return _OpenAIError(status, {"message": message, "type": kind, "param": param, "code": code})


def _response(error: _OpenAIError) -> web.Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return web.json_response({"error": error.body}, status=error.status, headers=headers)
