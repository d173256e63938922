"""Order of prompts: shares take turns; within one the shortest is first, with ageing. Pure."""

import heapq
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from kvrelay.core.fair_turns import FairTurns


class Prompt(Protocol):
    @property
    def num_remaining_tokens(self) -> int:
        raise NotImplementedError

    @property
    def share(self) -> str:
        raise NotImplementedError

    @property
    def share_weight(self) -> int:
        raise NotImplementedError


PromptT = TypeVar("PromptT", bound=Prompt)


class PromptQueue(Generic[PromptT]):
    """Shares get computed tokens by their weights.

    Within a share, prompts with the fewest tokens left go first, for the least mean time to first
    token. Ageing prevents starvation:

        rank = max(0, tokens left - tokens that overtook it), then the order of arrival
    """

    def __init__(self) -> None:
        self._prompts: dict[int, PromptT] = {}
        """In the order of arrival."""
        self._num_overtaken: dict[int, int] = {}
        self._turns = FairTurns()
        self._num_of_share: dict[str, int] = {}

    def push(self, prompt: PromptT) -> None:
        self._prompts[id(prompt)] = prompt
        self._num_overtaken[id(prompt)] = 0
        self._num_of_share[prompt.share] = self._num_of_share.get(prompt.share, 0) + 1
        self._turns.join(prompt.share)

    def remove(self, prompt: PromptT) -> None:
        del self._prompts[id(prompt)]
        del self._num_overtaken[id(prompt)]
        self._num_of_share[prompt.share] -= 1
        if not self._num_of_share[prompt.share]:
            del self._num_of_share[prompt.share]
            self._turns.leave(prompt.share)

    def in_order(self) -> Sequence[PromptT]:
        # stable: ties keep the order of arrival
        ranked = sorted(self._prompts.values(), key=self._rank)
        return ranked if len(self._num_of_share) <= 1 else self._in_turns(ranked)

    def count_scheduled(self, prompt: PromptT, num_tokens: int) -> None:
        """Ages the share's earlier prompts."""
        self._turns.charge(prompt.share, num_tokens, prompt.share_weight)
        for key, other in self._prompts.items():
            if other is prompt:
                return
            if other.share == prompt.share:
                self._num_overtaken[key] += num_tokens

    def _in_turns(self, ranked: Sequence[PromptT]) -> list[PromptT]:
        """As if each prompt were computed to its end in its turn."""
        of_share: dict[str, list[PromptT]] = {}
        for prompt in reversed(ranked):
            of_share.setdefault(prompt.share, []).append(prompt)
        places = {id(prompt): place for place, prompt in enumerate(ranked)}
        heap = [(self._turns.tag(share), places[id(prompts[-1])], share) for share, prompts in of_share.items()]
        heapq.heapify(heap)
        order: list[PromptT] = []
        while heap:
            tag, _, share = heap[0]
            prompts = of_share[share]
            prompt = prompts.pop()
            order.append(prompt)
            if prompts:
                tag += prompt.num_remaining_tokens / prompt.share_weight
                heapq.heapreplace(heap, (tag, places[id(prompts[-1])], share))
            else:
                heapq.heappop(heap)
        return order

    def _rank(self, prompt: PromptT) -> int:
        return max(0, prompt.num_remaining_tokens - self._num_overtaken[id(prompt)])
