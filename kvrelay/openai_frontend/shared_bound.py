"""A bound that clients share. Pure."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.errors import OverloadedError


class SharedBound:
    """One tenant gets at most half."""

    def __init__(self) -> None:
        self._taken: Counter[str | None] = Counter()

    @contextmanager
    def taking(self, amount: int, tenant: str | None, most: int, full: str) -> Iterator[None]:
        """Raises OverloadedError with the sentence `full`."""
        taken = self._taken[tenant]
        is_beyond_share = tenant is not None and taken > 0 and taken + amount > most // 2
        if is_beyond_share or self._taken.total() + amount > most:
            raise OverloadedError(full)
        self._taken[tenant] += amount
        try:
            yield
        finally:
            self._taken[tenant] -= amount
            self._taken += Counter()  # forgets who holds nothing
