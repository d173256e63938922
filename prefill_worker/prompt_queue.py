"""The order in which prompts get the tokens of a step: a seam for other policies. Pure."""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Prompt(Protocol):
    """What an order may look at."""

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that are still to be computed; before the prompt has begun, those without KV in the pool when it came."""
        raise NotImplementedError


PromptT = TypeVar("PromptT", bound=Prompt)


class PromptQueue(Protocol[PromptT]):
    """Prompts that are not computed yet, begun or not."""

    def push(self, prompt: PromptT) -> None:
        """A prompt comes in."""

    def remove(self, prompt: PromptT) -> None:
        """The prompt is computed, or given up."""

    def in_order(self) -> Sequence[PromptT]:
        """All of them; a step's tokens go to the first, then to the next, until there are none left."""
        raise NotImplementedError

    def note_scheduled(self, prompt: PromptT, num_tokens: int) -> None:
        """The prompt got so many tokens of the step that is being made."""


class FifoQueue(Generic[PromptT]):
    """First come, first served."""

    def __init__(self) -> None:
        self._prompts: dict[int, PromptT] = {}

    def push(self, prompt: PromptT) -> None:
        self._prompts[id(prompt)] = prompt

    def remove(self, prompt: PromptT) -> None:
        del self._prompts[id(prompt)]

    def in_order(self) -> Sequence[PromptT]:
        return list(self._prompts.values())

    def note_scheduled(self, prompt: PromptT, num_tokens: int) -> None:
        """Changes nothing."""


class ShortestFirstQueue(Generic[PromptT]):
    """The prompt with the fewest tokens left goes first, also before one that has begun: between two chunks it is overtaken.

    Shortest remaining work first gives the least mean time to first token. So that nobody starves, a prompt gets older with
    every token that goes to one that came later, and counts as that much shorter:

        rank = max(0, tokens left - tokens that overtook it), then who came first

    A prompt that was overtaken by as many tokens as it has left itself is overtaken no more. The clock of this is work and not
    time, so the order is a function of what was scheduled.
    """

    def __init__(self) -> None:
        self._num_overtaken: dict[int, int] = {}
        """By id, in the order of arrival."""
        self._prompts: dict[int, PromptT] = {}

    def push(self, prompt: PromptT) -> None:
        self._prompts[id(prompt)] = prompt
        self._num_overtaken[id(prompt)] = 0

    def remove(self, prompt: PromptT) -> None:
        del self._prompts[id(prompt)]
        del self._num_overtaken[id(prompt)]

    def in_order(self) -> Sequence[PromptT]:
        return sorted(self._prompts.values(), key=self._rank)  # stable: who came first stays first

    def note_scheduled(self, prompt: PromptT, num_tokens: int) -> None:
        for key in self._num_overtaken:
            if key == id(prompt):
                return
            self._num_overtaken[key] += num_tokens

    def _rank(self, prompt: PromptT) -> int:
        return max(0, prompt.num_remaining_tokens - self._num_overtaken[id(prompt)])
