"""The protocol's messages and errors as JSON."""

from __future__ import annotations  # aiohttp's classes are named for type checkers only

import json
import math
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from kvrelay.errors import InvalidRequestError, KvrelayError, OverloadedError, UnavailableError
from kvrelay.wire.errors import code_of

if TYPE_CHECKING:
    from aiohttp import web

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

# As google.rpc maps codes to HTTP.
_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class HttpRefusal(Exception):
    """A refusal by HTTP's own rules, with the nearest gRPC status code."""

    def __init__(
        self, status: int, message: str, code: str = "INVALID_ARGUMENT", reason: str = InvalidRequestError.reason
    ) -> None:
        super().__init__(message)
        self.status = status
        self.fields = {"error": message, "reason": reason, "code": code}


def to_json(message: Message) -> dict[str, Any]:
    """Includes fields with default values."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def json_response(text: str, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Uncached."""
    from aiohttp import web

    return web.Response(text=text, status=status, content_type="application/json", headers=HEADERS | (headers or {}))


def error_json(error: KvrelayError) -> dict[str, str]:
    return {"error": error.message, "reason": error.reason, "code": code_of(error).name}


def error_response(error: KvrelayError | HttpRefusal) -> web.Response:
    if isinstance(error, HttpRefusal):
        return json_response(json.dumps(error.fields), error.status)
    retry_ms = error.retry_after_ms if isinstance(error, OverloadedError | UnavailableError) else None
    headers = {} if retry_ms is None else {"Retry-After": str(math.ceil(retry_ms / 1000))}
    return json_response(json.dumps(error_json(error)), _STATUSES.get(code_of(error), 500), headers)
