"""The order in which prompts are computed: a seam for other policies. Pure."""

from collections import deque
from typing import Generic, Protocol, TypeVar

ItemT = TypeVar("ItemT")


class PromptQueue(Protocol[ItemT]):
    """Prompts that wait for their first chunk."""

    def __len__(self) -> int:
        """How many wait."""
        raise NotImplementedError

    def push(self, item: ItemT) -> None:
        """A prompt comes in."""

    def peek(self) -> ItemT:
        """The prompt that is next; the queue is not empty."""
        raise NotImplementedError

    def remove(self, item: ItemT) -> None:
        """The prompt is taken, or given up."""


class FifoQueue(Generic[ItemT]):
    """First come, first served."""

    def __init__(self) -> None:
        self._items: deque[ItemT] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: ItemT) -> None:
        self._items.append(item)

    def peek(self) -> ItemT:
        return self._items[0]

    def remove(self, item: ItemT) -> None:
        self._items.remove(item)
