"""When a request must have ended: what its client allows, within the gateway's bounds. Knows no protocol."""

from kvrelay.config import RelaySettings


def time_allowed_s(settings: RelaySettings, *allowed_s: float | None) -> float:
    """How long a request may take, in seconds; 0 when its time is over already.

    Args:
        settings: with the longest time, and the one of a request whose client set none.
        allowed_s: what the client allows, as by the call's deadline and by the request's own; None where it says nothing.
    """
    given_s = [seconds for seconds in allowed_s if seconds is not None]
    wanted_s = min(given_s) if given_s else settings.default_timeout_ms / 1000
    return max(min(wanted_s, settings.max_timeout_ms / 1000), 0.0)
