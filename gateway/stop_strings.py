"""Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one. Pure."""

from collections.abc import Sequence


class StopStringFinder:
    """Lets text through up to the stop string that is complete first; of two that complete together, the one that begins first.

    The result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        match = self._first_match()
        if match is not None:
            self.found = True
            return self._release(match)
        return self._release(len(self._held) - self._num_suspicious())

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _first_match(self) -> int | None:
        """Where the first match begins in the held text."""
        begins = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(begin + len(stop), begin) for begin, stop in begins if begin >= 0]
        return min(ends)[1] if ends else None

    def _num_suspicious(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
