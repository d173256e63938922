"""Sizes of what others send, compared before anything is done with it. Pure."""

import re
from collections.abc import Sized

from kvrelay.core.quoting import quoted
from kvrelay.errors import InvalidRequestError, RequestNotFoundError

MAX_NAME_BYTES = 128
"""Of a name, an id, a key, a role or a page token."""
MAX_ADDRESS_BYTES = 512
"""Of host:port; a host's name has at most 253."""

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")


def check_length(field: str, text: str, max_bytes: int = MAX_NAME_BYTES) -> None:
    num_bytes = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
    if num_bytes > max_bytes:
        raise InvalidRequestError(field, f"has {num_bytes} bytes; at most {max_bytes} are allowed")


def check_count(field: str, entries: Sized, max_entries: int) -> None:
    if len(entries) > max_entries:
        raise InvalidRequestError(field, f"has {len(entries)} entries; at most {max_entries} are allowed")


def is_request_id(text: str) -> bool:
    return _REQUEST_ID.fullmatch(text) is not None


def check_request_id(request_id: str) -> None:
    """For ids of clients, before they become keys. Raises RequestNotFoundError for what is none."""
    if not is_request_id(request_id):
        problem = f"no request is called {quoted(request_id)}: ids have 32 hexadecimal digits"
        raise RequestNotFoundError(f"{problem}, as in a stream's first message")
