"""Which gateways a client may ask, and which one it asks now."""

from collections.abc import Sequence

DEFAULT_TIMEOUT_S = 300.0
"""Of calls of a client that was given none."""


class Addresses:
    """host:port of one or several gateways, asked in turn: the one that answered last is asked first.

    Args:
        addresses: one address, several separated by commas, or a sequence of them.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, addresses: str | Sequence[str]) -> None:
        parts = addresses.split(",") if isinstance(addresses, str) else addresses
        self.all = tuple(part.strip() for part in parts if part.strip())
        if not self.all:
            raise ValueError("a client needs the address of a gateway, as host:port")
        self._current = 0

    @property
    def current(self) -> str:
        return self.all[self._current]

    def move_on(self) -> None:
        """The current one did not answer: the next one is asked from now on."""
        self._current = (self._current + 1) % len(self.all)
