"""Whether a session's peer is alive. The caller owns the clock.

Each side sends a heartbeat after a third of the window in silence, and answers every heartbeat.
"""

HELLO_TIMEOUT_S = 5.0
PROTOCOL_VERSION = 1


class Liveness:
    """Times are monotonic seconds."""

    def __init__(self, window_ms: int, now: float) -> None:
        self._window_s = window_ms / 1000
        self._last_received = now
        self._last_sent = now
        self._last_look = now
        self._num_heartbeats = 0

    @property
    def interval_s(self) -> float:
        """How often to call `lost`."""
        return self._window_s / 6

    def received(self, now: float) -> None:
        self._last_received = now

    def sent(self, now: float) -> None:
        self._last_sent = now

    def heartbeat_due(self, now: float) -> int | None:
        """Returns the number of the heartbeat to send now."""
        if now - self._last_sent < self._window_s / 3:
            return None
        self._num_heartbeats += 1
        return self._num_heartbeats

    def lost(self, now: float) -> bool:
        """Whether the peer was silent for longer than the window.

        A late call extends the window: this process has not yet read what its peer sent.
        """
        late_s = now - self._last_look - self.interval_s
        self._last_look = now
        if late_s > self.interval_s:
            self._last_received = min(self._last_received + late_s, now)
        return now - self._last_received > self._window_s

    def silent_ms(self, now: float) -> float:
        return (now - self._last_received) * 1000
