"""Divides a step's prompt tokens among the prompts that a decode worker computes itself. Pure."""

from collections import deque
from collections.abc import Sequence

from decode_worker.scheduling.running_sequence import RunningSequence
from kvrelay.core.fair_turns import FairTurns


class PromptTurns:
    """Shares take turns by computed tokens; within one the oldest prompt is first."""

    def __init__(self) -> None:
        self._turns = FairTurns()

    def divide(self, prompts: Sequence[RunningSequence], budget: int) -> dict[RunningSequence, int]:
        """`prompts`: the oldest first. Returns how many tokens of each are computed."""
        by_share: dict[str, deque[RunningSequence]] = {}
        for prompt in prompts:
            by_share.setdefault(prompt.job.share, deque()).append(prompt)
        for share in self._turns.in_order():
            if share not in by_share:
                self._turns.leave(share)
        for share in by_share:
            self._turns.join(share)
        given: dict[RunningSequence, int] = {}
        while budget > 0 and by_share:
            share = min(by_share, key=lambda each: (self._turns.tag(each), by_share[each][0].num_uncomputed_tokens))
            prompt = by_share[share].popleft()
            if not by_share[share]:
                del by_share[share]
            given[prompt] = min(prompt.num_uncomputed_tokens, budget)
            budget -= given[prompt]
            self._turns.charge(share, given[prompt], prompt.job.share_weight)
        return given
