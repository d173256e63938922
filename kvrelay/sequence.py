"""A sequence inside an engine: its tokens, how many of them have KV, and its blocks."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvrelay.kv_cache.block_manager import BlockTable
from kvrelay.work import Work

if TYPE_CHECKING:
    from kvrelay.grammar import GrammarMatcher


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's continuations on one worker.

        token_ids   |<- KV in blocks ->|<- to compute ->|
                    0         num_computed_tokens   len(token_ids)

    A decoding sequence has exactly one token to compute: the last one sampled. A new, waiting or preempted one has more.
    """

    work: Work
    number: int
    """The sequence within its request, from 0."""
    token_ids: list[int]
    block_table: BlockTable | None = None
    """None while the sequence holds no blocks."""
    num_computed_tokens: int = 0
    output_counts: dict[int, int] = field(default_factory=dict)
    """How often each token was generated; for penalties."""
    matcher: "GrammarMatcher | None" = None
    """Which tokens its form lets it say; None: any."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def next_index(self) -> int:
        """Output index of the next token to be sampled."""
        return len(self.token_ids) - self.work.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Adds a sampled token."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1


def start_sequence(work: Work, number: int) -> Sequence:
    """A sequence at the start of its work; the tokens emitted by earlier attempts count as output."""
    sequence = Sequence(work, number, list(work.token_ids))
    if work.grammar is not None:
        sequence.matcher = work.grammar.matcher()
    for token_id in work.token_ids[work.num_prompt_tokens :]:
        sequence.output_counts[token_id] = sequence.output_counts.get(token_id, 0) + 1
    return sequence
