"""One sequence's share of a step, as whoever runs the model gets it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepInput:
    """One sequence's share of a step.

    sequence    |<- KV in blocks ->|<- token_ids ->|
                0               position     position + len(token_ids)
    """

    token_ids: Sequence[int]
    """The new tokens, at least one."""
    position: int
    """Position of the first of them in the sequence."""
    block_ids: Sequence[int]
    """The sequence's blocks, with room for the new tokens."""
    num_logits: int
    """How many of the last new tokens have their logits wanted: 0 of none, 1 of the last one, k of the last k."""
