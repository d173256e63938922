"""Ids that VllmEngine's clients choose for their requests. They are no keys of anything stored."""

from kvrelay.core.bounds import check_length
from kvrelay.errors import InvalidRequestError

MAX_ABORTED = 1024
"""Requests that one Abort names."""


def check_client_id(request_id: str) -> None:
    if not request_id:
        raise InvalidRequestError("request_id", "is empty; Abort needs it")
    check_length("request_id", request_id)
