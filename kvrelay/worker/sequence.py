"""Tokens and blocks of one sequence in an engine. Pure."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrelay.core.job import Job
from kvrelay.kv_cache.block_manager import BlockTable

if TYPE_CHECKING:
    # compiles in threads
    from kvrelay.structured_output.grammar import CompiledGrammar, GrammarMatcher


@dataclass(frozen=True, slots=True)
class PreparedJob:
    job: Job
    grammar: "CompiledGrammar | None" = None


class TokenSequence:
    """One of a job's sequences on one worker. Tokens of earlier attempts count as output.

        token_ids   |<- KV in blocks ->|<- to compute ->|
                    0         num_computed_tokens   len(token_ids)

    A decoding sequence has one token to compute; others have more. Sequences with the same
    uncomputed prompt are one TokenSequence with several `sequence_ids`.
    """

    def __init__(self, prepared: PreparedJob, sequence_ids: tuple[int, ...]) -> None:
        job, grammar = prepared.job, prepared.grammar
        self.job = job
        self.sequence_ids = sequence_ids
        self.token_ids = list(job.token_ids)
        self.block_table: BlockTable | None = None
        self.num_computed_tokens = 0
        self.output_counts: dict[int, int] = {}
        """By token id; for penalties."""
        for token_id in job.token_ids[job.num_prompt_tokens :]:
            self._count_output(token_id)
        self.matcher: GrammarMatcher | None = None if grammar is None else grammar.matcher()
        """None allows any token."""
        self.awaits_mask = False
        """Another thread computes its mask; schedulers skip it."""

    def __repr__(self) -> str:
        """Names the job, because tests arm fault points for the steps of one request."""
        return f"{type(self).__name__}(job={self.job!r}, sequence_ids={self.sequence_ids!r})"

    @property
    def table(self) -> BlockTable:
        assert self.block_table is not None, "a scheduled sequence holds blocks"
        return self.block_table

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def next_index(self) -> int:
        """Output index of the next token to sample."""
        return len(self.token_ids) - self.job.num_prompt_tokens

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self._count_output(token_id)

    def _count_output(self, token_id: int) -> None:
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1
