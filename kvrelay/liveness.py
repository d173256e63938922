"""Whether a session's peer is alive, judged by what arrives. A pure function of the times given to it; the caller owns the clock.

Both sides send a heartbeat when they were silent for a third of the window, and answer every heartbeat. Anything that arrives is
a sign of life, so a busy session costs no heartbeats at all.
"""

PROTOCOL_VERSION = 1
"""Version of the session protocol; both hellos carry it."""


class Liveness:
    """One side's view of one session. Times are monotonic seconds."""

    def __init__(self, window_ms: int, now: float) -> None:
        self._window_s = window_ms / 1000
        self._last_received = now
        self._last_sent = now
        self._last_look = now
        self._num_heartbeats = 0

    @property
    def interval_s(self) -> float:
        """How often the caller should look, in seconds."""
        return self._window_s / 6

    def received(self, now: float) -> None:
        """Something arrived from the peer."""
        self._last_received = now

    def sent(self, now: float) -> None:
        """Something was sent to the peer."""
        self._last_sent = now

    def heartbeat_due(self, now: float) -> int | None:
        """Number of the heartbeat to send now, or None."""
        if now - self._last_sent < self._window_s / 3:
            return None
        self._num_heartbeats += 1
        return self._num_heartbeats

    def lost(self, now: float) -> bool:
        """Whether the peer was silent for longer than the window; to be asked once in every interval.

        What the caller comes late by is not counted: a process that stood still has not read yet what its peer sent meanwhile.
        """
        late_s = now - self._last_look - self.interval_s
        self._last_look = now
        if late_s > self.interval_s:
            self._last_received = min(self._last_received + late_s, now)
        return now - self._last_received > self._window_s

    def silent_ms(self, now: float) -> float:
        """How long nothing arrived, in milliseconds."""
        return (now - self._last_received) * 1000
