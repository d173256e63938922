"""How many tokens of a sequence to guess, from how the last guesses fared. Pure.

    all accepted                  twice as many
    some accepted                 one more than these
    none, repeatedly              a pause, then one
    too few to pay in this step   one, now and then

A guess costs a row of the step, so a sequence without repetition must guess almost nothing.
"""

from collections.abc import Sequence

from decode_worker.scheduling.prompt_lookup import PromptLookup

FIRST_LENGTH = 4
MISSES_BEFORE_PAUSE = 2
FIRST_PAUSE_STEPS = 8
MAX_PAUSE_STEPS = 128
TRIAL_PAUSE_STEPS = 32
"""Pause between trials of a sequence whose guesses do not pay."""
SHARE_WEIGHT = 0.25
"""Of the last step in the moving average."""


class DraftLength:
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = min(FIRST_LENGTH, max_tokens)
        self._num_misses = 0
        self._pause_steps = FIRST_PAUSE_STEPS
        self._num_steps_to_wait = 0
        self._accepted_share = 1.0

    def next_step(self, least_share: float = 0.0) -> int:
        """Call once per step. Guesses pay in it above an accepted share of `least_share`."""
        if self._num_steps_to_wait > 0:
            self._num_steps_to_wait -= 1
            return 0
        if self._accepted_share < least_share:
            self._num_steps_to_wait = TRIAL_PAUSE_STEPS
            return 1
        return self._length

    def on_verified(self, num_drafted: int, num_accepted: int) -> None:
        self._accepted_share += SHARE_WEIGHT * (num_accepted / num_drafted - self._accepted_share)
        if num_accepted > 0:
            self._num_misses = 0
            self._pause_steps = FIRST_PAUSE_STEPS
            wanted = max(self._length, 2 * num_accepted) if num_accepted == num_drafted else num_accepted + 1
            self._length = min(self._max_tokens, wanted)
            return
        self._num_misses += 1
        self._length = 1
        if self._num_misses >= MISSES_BEFORE_PAUSE:
            self._num_steps_to_wait = self._pause_steps
            self._pause_steps = min(MAX_PAUSE_STEPS, 2 * self._pause_steps)


class Drafter:
    def __init__(self, max_tokens: int) -> None:
        self._length = DraftLength(max_tokens)
        self._lookup = PromptLookup()

    def draft(self, token_ids: Sequence[int], max_tokens: int, least_share: float) -> tuple[int, ...]:
        return self._lookup.propose(token_ids, min(self._length.next_step(least_share), max_tokens))

    def on_verified(self, num_drafted: int, num_accepted: int) -> None:
        self._length.on_verified(num_drafted, num_accepted)
