"""Checks response formats in a confined child: see `kvrelay.runtime.confined_main`."""

import json

from kvrelay.core.response_format import FormatKind, ResponseFormat
from kvrelay.errors import InvalidRequestError
from kvrelay.structured_output.grammar import check_response_format
from kvrelay.structured_output.heap_bytes import heap_bytes

BYTES_PER_CHARACTER = 64
"""Where the heap cannot be measured."""


def prepare() -> None:
    check_response_format(ResponseFormat.json_object())


def answer(request: bytes) -> bytes:
    """`{"kind", "source"}` in, `{"problem": a sentence's end or null, "num_bytes"}` out."""
    asked = json.loads(request)
    before = heap_bytes()
    try:
        grammar = check_response_format(ResponseFormat(FormatKind(asked["kind"]), asked["source"]))
    except InvalidRequestError as error:
        return json.dumps({"problem": error.problem, "num_bytes": 0}).encode()
    after = heap_bytes()
    del grammar  # it had to last until the heap was measured
    size = BYTES_PER_CHARACTER * len(asked["source"]) if before is None or after is None else after - before
    return json.dumps({"problem": None, "num_bytes": max(size, len(asked["source"]))}).encode()
