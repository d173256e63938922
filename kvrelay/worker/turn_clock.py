"""How long an engine's turn lasts, less the time for which its whole process stood still. Pure."""


class TurnClock:
    """Is looked at every `interval_s`. By how much a look is late, nothing in the process ran."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_look: float | None = None
        self._last_turn_s = 0.0
        self._stood_still_s = 0.0

    def look(self, turn_s: float, now: float) -> float:
        """Returns the turn's own seconds; `turn_s` are those since it began."""
        if turn_s < self._last_turn_s:
            self._stood_still_s = 0.0
        elif self._last_look is not None:
            self._stood_still_s += max(0.0, now - self._last_look - self._interval_s)
        self._last_turn_s, self._last_look = turn_s, now
        return max(0.0, turn_s - self._stood_still_s)
