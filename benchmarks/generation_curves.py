"""What a generation's time per token adds up to. Arithmetic only: runs no model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GenerationCurve:
    """One generation by one engine, with or without a KV cache."""

    model: str
    engine: str
    has_cache: bool
    round: int
    is_sampled: bool
    """Whether only some of the tokens were timed and the others are interpolated."""
    num_prompt_tokens: int
    token_ms: tuple[float, ...]
    """Of each new token; the first includes the prompt."""
    num_equal_tokens: int | None = None
    """Leading tokens that are those of the first curve of the model; None where no tokens were
    generated.
    """

    @property
    def total_s(self) -> float:
        return sum(self.token_ms) / 1000

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ms) / self.total_s

    @property
    def lengths(self) -> list[int]:
        """Tokens of the sequence once each new token is there."""
        return list(range(self.num_prompt_tokens + 1, self.num_prompt_tokens + 1 + len(self.token_ms)))

    @property
    def cumulated_s(self) -> list[float]:
        """Seconds from the start until each new token."""
        return [total / 1000 for total in itertools.accumulate(self.token_ms)]

    @property
    def label(self) -> str:
        """For tables and plots."""
        return f"{self.engine}, {'KV cache' if self.has_cache else 'no cache'}{' (sampled)' if self.is_sampled else ''}"


def sampled_steps(num_tokens: int, sample_every: int) -> list[int]:
    """Which new tokens to time, from 0: one in so many, and the last."""
    return sorted({*range(0, num_tokens, sample_every), num_tokens - 1})


def interpolated(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """Values of all steps from the first to the last of `steps`, linear between those that are
    known.

    Args:
        steps: rising, at least one.
        values: one for each.
    """
    filled = [values[0]]
    for (begin, end), (first, last) in zip(itertools.pairwise(steps), itertools.pairwise(values), strict=True):
        filled += [first + (last - first) * (step - begin) / (end - begin) for step in range(begin + 1, end + 1)]
    return filled


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are equal."""
    return next(
        (at for at, (ours, theirs) in enumerate(zip(first, second, strict=False)) if ours != theirs), len(first)
    )


def median_curve(curves: Sequence[GenerationCurve]) -> GenerationCurve:
    """The curve whose total is the median of all, or the lower one of the two in the middle."""
    return sorted(curves, key=lambda curve: curve.total_s)[(len(curves) - 1) // 2]
