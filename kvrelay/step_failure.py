"""What an engine loop says of works whose step could not be computed; the log has the rest."""

from kvrelay.errors import InvalidRequestError
from kvrelay.work import FailureKind

INTERNAL_MESSAGE = "the worker failed to compute the step; its log has the detail"


def failure_of(error: Exception) -> tuple[FailureKind, str]:
    """Kind and message. What is wrong with the request itself is its client's to know, and no other worker's to try."""
    if isinstance(error, InvalidRequestError):
        return FailureKind.INVALID, error.message
    return FailureKind.INTERNAL, INTERNAL_MESSAGE
