"""Explains why no gateway answered a call, from gRPC's messages."""

import re
from collections.abc import Sequence

from kvrelay.config.settings import DEFAULT_GATEWAY_PORT
from kvrelay.errors import UnavailableError

_HTTP_ANSWER = re.compile(r"Received http2 header with status: (\d+)")
_NO_GATEWAY_ERRORS = ("502", "503", "504")
"""HTTP statuses of a gRPC proxy whose gateway is away."""
_WHICH_PORT = f"a gateway's gRPC port is usually {DEFAULT_GATEWAY_PORT}"


def unreachable_error(details: str, addresses: Sequence[str]) -> UnavailableError:
    """`details` is gRPC's message."""
    return UnavailableError(f"cannot reach a gateway at {' or '.join(addresses)}: {_cause(details)}")


def is_answer_of_http(details: str) -> bool:
    """Whether a server without gRPC answered over HTTP/2."""
    found = _HTTP_ANSWER.search(details)
    return found is not None and found[1] not in _NO_GATEWAY_ERRORS


def _cause(details: str) -> str:
    if "http1.x" in details:
        return f"that port speaks HTTP and not gRPC; {_WHICH_PORT}"
    if is_answer_of_http(details):
        (status,) = _HTTP_ANSWER.findall(details)
        return f"that port speaks HTTP and not gRPC (it answered with status {status}); {_WHICH_PORT}"
    if "Failed parsing HTTP/2" in details:
        return f"what listens there speaks another protocol than gRPC; {_WHICH_PORT}"
    # gRPC's text is a chain of causes; the last one is what a person wants to know.
    return details.rpartition(": ")[2].rstrip("]")
