"""Whose turn it is when several shares want the same service: start-time fair queuing. Pure."""

KEPT_FOR_OTHERS = 0.25
"""Part of a pool that a share's prompts leave free, once there are other shares."""

MAX_SHARES_KEPT = 256


class FairTurns:
    """Serves waiting shares in proportion to their weights.

    Each waiting share has a tag, and the one with the least is next:

        join      tag = max(its last tag, tag of the last served)
        charge    tag += cost / weight

    So a share that did not want anything has nothing saved up. After Goyal, Vin and Cheng,
    "Start-time fair queueing", 1996.
    """

    def __init__(self) -> None:
        self._tags: dict[str, float] = {}
        """Of waiting shares, in the order of joining."""
        self._left: dict[str, float] = {}
        """Of shares that left with more service than others."""
        self._served_tag = 0.0

    def __contains__(self, share: str) -> bool:
        return share in self._tags

    def join(self, share: str) -> None:
        """Idempotent."""
        if share not in self._tags:
            self._tags[share] = max(self._left.pop(share, 0.0), self._served_tag)

    def leave(self, share: str) -> None:
        """Idempotent."""
        tag = self._tags.pop(share, None)
        if not self._tags:
            self._left.clear()
            self._served_tag = 0.0
        elif tag is not None and tag > self._served_tag:
            self._left[share] = tag
            if len(self._left) > MAX_SHARES_KEPT:
                del self._left[min(self._left, key=self._left.__getitem__)]

    def in_order(self) -> list[str]:
        """Waiting shares, the next one first."""
        # stable: ties keep the order of joining
        return sorted(self._tags, key=self._tags.__getitem__)

    def tag(self, share: str) -> float:
        """The share must be waiting."""
        return self._tags[share]

    def charge(self, share: str, cost: float, weight: int = 1) -> None:
        """The share must be waiting."""
        tag = self._tags[share]
        self._served_tag = max(self._served_tag, tag)
        self._tags[share] = tag + cost / weight


class SeenShares:
    """Whether there were ever two shares: a worker of one tenant keeps nothing free for others."""

    def __init__(self) -> None:
        self._first: str | None = None
        self.are_several = False

    def add(self, share: str) -> None:
        if self._first is None:
            self._first = share
        self.are_several |= share != self._first
