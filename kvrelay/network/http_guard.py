"""Guards the routes of the HTTP port by the same credentials as calls.

A program sends `Authorization: Bearer KEY`; a browser sends Basic, whose password is the key. Over
HTTPS both may show a certificate instead.
"""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import base64
import binascii
import json
from typing import TYPE_CHECKING

from kvrelay.errors import KvrelayError, UnauthenticatedError
from kvrelay.security.guard import CallGuard
from kvrelay.security.principal import set_current_principal
from kvrelay.security.role_names import auth_context_of
from kvrelay.wire.errors import code_of

if TYPE_CHECKING:
    from aiohttp import web
    from aiohttp.typedefs import Handler, Middleware

CHALLENGE = 'Bearer realm="kvrelay", Basic realm="kvrelay", charset="UTF-8"'
_BASIC = "basic "


def guarding(guard: CallGuard) -> Middleware:
    """Routes without a rule are refused; unknown paths stay 404."""
    from aiohttp import web

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        if resource is None:
            return await handler(request)
        method = "GET" if request.method == "HEAD" else request.method
        try:
            route, certificate = f"{method} {resource.canonical}", request.get_extra_info("peercert")
            principal = guard.check(route, _metadata(request), auth_context_of(certificate), request.remote or "")
        except KvrelayError as refusal:
            return _refused(refusal)
        set_current_principal(principal)
        try:
            with guard.following(principal):
                return await handler(request)
        except UnauthenticatedError as withdrawal:
            if request.transport is not None:
                request.transport.abort()  # the answer may have begun
            return _refused(withdrawal)

    return check


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [("authorization", _bearer(value)) for value in request.headers.getall("Authorization", [])]


def _bearer(value: str) -> str:
    """Turns a Basic authorization into a bearer's; others stay."""
    if value[: len(_BASIC)].lower() != _BASIC:
        return value
    try:
        _, _, key = base64.b64decode(value[len(_BASIC) :], validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return f"Bearer {key}"


def _refused(refusal: KvrelayError) -> web.Response:
    from aiohttp import web

    is_unknown = isinstance(refusal, UnauthenticatedError)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    if is_unknown:
        headers["WWW-Authenticate"] = CHALLENGE
    fields = {"error": refusal.message, "reason": refusal.reason, "code": code_of(refusal).name}
    return web.Response(
        text=json.dumps(fields), status=401 if is_unknown else 403, content_type="application/json", headers=headers
    )
