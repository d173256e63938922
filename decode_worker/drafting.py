"""One sequence's guesses: what they are, and how many tokens, from how the last ones fared. Pure.

    all accepted: twice as many    some accepted: one more than these    none, again and again: pause, then try with one
    share of accepted ones below what pays in a step as full as this: one, now and then

A guessed token costs its row of the step whether or not it is accepted. In a sequence that repeats itself nearly all are; in one
that does not nearly none, and it must run as if nothing had been guessed.
"""

from collections.abc import Sequence

from decode_worker.prompt_lookup import PromptLookup

FIRST_LENGTH = 4
MISSES_BEFORE_PAUSE = 2
"""Steps in a row without an accepted token, after which a sequence pauses."""
FIRST_PAUSE_STEPS = 8
MAX_PAUSE_STEPS = 128
TRIAL_PAUSE_STEPS = 32
"""Between trials of a sequence whose guesses do not pay at present."""
SHARE_WEIGHT = 0.25
"""Of the last step in the moving average of the accepted share."""


class DraftLength:
    """One sequence's.

    Args:
        max_tokens: never guess more.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = min(FIRST_LENGTH, max_tokens)
        self._num_misses = 0
        self._pause_steps = FIRST_PAUSE_STEPS
        self._num_steps_to_wait = 0
        self._accepted_share = 1.0

    def next_step(self, least_share: float = 0.0) -> int:
        """How many tokens to guess in the step that is about to be made; 0 during a pause. Once per step.

        Args:
            least_share: share of accepted guesses from which on they pay in this step.
        """
        if self._num_steps_to_wait > 0:
            self._num_steps_to_wait -= 1
            return 0
        if self._accepted_share < least_share:
            self._num_steps_to_wait = TRIAL_PAUSE_STEPS
            return 1
        return self._length

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """What became of a guess of at least one token."""
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
    """One sequence's.

    Args:
        max_tokens: never guess more at once.
    """

    def __init__(self, max_tokens: int) -> None:
        self._length = DraftLength(max_tokens)
        self._lookup = PromptLookup()

    def draft(self, token_ids: Sequence[int], max_tokens: int, least_share: float) -> tuple[int, ...]:
        """The guess for the step that is about to be made. Once per step.

        Args:
            token_ids: the sequence's tokens.
            max_tokens: most that are wanted; may be negative.
            least_share: share of accepted guesses from which on they pay in this step.
        """
        return self._lookup.propose(token_ids, min(self._length.next_step(least_share), max_tokens))

    def note_verified(self, num_drafted: int, num_accepted: int) -> None:
        """What became of a guess of at least one token."""
        self._length.note(num_drafted, num_accepted)
