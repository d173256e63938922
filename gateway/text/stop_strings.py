"""Finds stop strings in text that arrives in pieces. Pure."""

from collections.abc import Sequence


class StopStringFinder:
    """Passes text up to the first complete stop string; of two, the one that begins first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Returns text that certainly precedes any stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        match = self._first_match()
        if match is not None:
            self.found = True
            return self._release(match)
        return self._release(len(self._held) - self._num_uncertain())

    def flush(self) -> str:
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _first_match(self) -> int | None:
        begins = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        return min(ends)[1] if ends else None

    def _num_uncertain(self) -> int:
        """Length of the longest end with which a stop string may begin."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
