"""Checks response formats in a confined child: see `kvrelay.runtime.confined_main`."""

import json

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.structured_output.grammar import check_response_format


def prepare() -> None:
    check_response_format(ResponseFormat.json_object())


def answer(request: bytes) -> bytes:
    """`{"kind", "source"}` in, `{"problem": a sentence's end or null}` out."""
    asked = json.loads(request)
    try:
        check_response_format(ResponseFormat(FormatKind(asked["kind"]), asked["source"]))
    except InvalidRequestError as error:
        return json.dumps({"problem": error.problem}).encode()
    return json.dumps({"problem": None}).encode()
