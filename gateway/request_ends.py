"""What clients are told when the gateway itself ends a request. Knows no request."""

from kvrelay.errors import DeadlineError, InternalError, OverloadedError


def quarantine_error() -> InternalError:
    """Two workers have died of it."""
    return InternalError(
        "the request is quarantined: a worker died while it computed this request and perhaps others, and another one while it"
        " computed nothing else; it is not attempted again, and the workers' logs have the detail"
    )


def too_slow_error() -> OverloadedError:
    """Its readers have been far behind for too long."""
    return OverloadedError("the client reads its stream too slowly, and its tokens cannot be kept for ever; read faster")


def deadline_error() -> DeadlineError:
    """Its time is over."""
    return DeadlineError("the request's deadline passed before it was done; allow more time, or ask for fewer tokens")
