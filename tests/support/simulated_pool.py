"""A KV pool that stores which tokens its values came from, and a model that reads it.

The value at position p of a sequence is the hash of its first p + 1 tokens. A step checks all KV
before its own tokens, so a wrongly freed, shared, copied or written block is noticed by the next
step that reads it.
"""

import zlib
from collections.abc import Sequence

from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import Job, SequenceToken, Token
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.worker.step import Step, StepEntry
from kvrelay.worker.verification import accept_tokens

VOCAB_SIZE = 50
MODEL = ModelSpec("m", "llama", KVLayout(1, 1, 1, "float32"), VOCAB_SIZE, 64, (0,), "f")


def prefix_value(token_ids: Sequence[int]) -> int:
    return zlib.crc32(bytes(token_ids))


def next_token(token_ids: Sequence[int], number: int) -> int:
    """The sequence's next token; never an end of sequence. Repeats itself, but never for long."""
    value = prefix_value(token_ids)
    if value % 16 == 0:
        return 1 + (value // 16 + number) % (VOCAB_SIZE - 1)
    return 1 + (5 * token_ids[-1] + number + 3) % 7


def expected_output(job: Job, number: int) -> list[int]:
    """All tokens of an undisturbed sequence."""
    token_ids = list(job.token_ids)
    while True:
        index = len(token_ids) - job.num_prompt_tokens
        token_id = next_token(token_ids, number)
        token_ids.append(token_id)
        if finish_reason(token_id, index, job.num_prompt_tokens, job.sampling, MODEL):
            return token_ids[job.num_prompt_tokens :]


class SimulatedPool:
    """Slots by block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._values: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def write(self, block_ids: Sequence[int], token_ids: Sequence[int], begin: int, end: int) -> None:
        for position in range(begin, end):
            block = block_ids[position // self._block_size]
            self._values[block][position % self._block_size] = prefix_value(token_ids[: position + 1])

    def check(self, block_ids: Sequence[int], token_ids: Sequence[int], end: int) -> None:
        for position in range(end):
            value = self._values[block_ids[position // self._block_size]][position % self._block_size]
            assert value == prefix_value(token_ids[: position + 1]), f"position {position} holds KV of something else"

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self._values[copy.target] = list(self._values[copy.source])

    def run(self, step: Step) -> list[SequenceToken]:
        """Does the engine's part of a step."""
        self.copy(step.copies)
        for entry in step.entries:
            assert entry.sequence.block_table is not None
            self.check(entry.sequence.block_table.blocks, entry.sequence.token_ids, entry.token_begin)
        for entry in step.entries:
            assert entry.sequence.block_table is not None
            computed, end = computed_tokens(entry), entry.token_end + len(entry.drafts)
            self.write(entry.sequence.block_table.blocks, computed, entry.token_begin, end)
        for entry in step.entries:  # a write of one entry into another's blocks shows here
            assert entry.sequence.block_table is not None
            self.check(entry.sequence.block_table.blocks, computed_tokens(entry), entry.token_end + len(entry.drafts))
        sampled = [token for entry in step.entries for token in self.sample(entry)]
        return accept_tokens(step.entries, sampled, MODEL)

    def sample(self, entry: StepEntry) -> list[Token]:
        """One token per continued sequence, or one per row of an entry with drafts."""
        tokens = computed_tokens(entry)
        rows = (
            [(entry.continued[0], entry.token_end + offset) for offset in range(entry.num_logits)]
            if entry.drafts
            else []
        )
        rows = rows or [(number, entry.token_end) for number in entry.continued]
        return [Token(self.next_token(entry.sequence.job, number, tokens[:end])) for number, end in rows]

    def next_token(self, job: Job, number: int, token_ids: Sequence[int]) -> int:
        """The model's token after these."""
        return next_token(token_ids, number)


def computed_tokens(entry: StepEntry) -> list[int]:
    """Tokens whose KV a step's entry has, from the start of the sequence."""
    if entry.drafts:
        assert entry.token_end == entry.sequence.num_tokens, "drafts stand behind all of the sequence's tokens"
    return [*entry.sequence.token_ids[: entry.token_end], *entry.drafts]


def make_token(job: Job, number: int, token_ids: Sequence[int]) -> SequenceToken:
    """The token that follows `token_ids`."""
    token_id = next_token(token_ids, number)
    index = len(token_ids) - job.num_prompt_tokens
    reason = finish_reason(token_id, index, job.num_prompt_tokens, job.sampling, MODEL)
    return SequenceToken(job.job_id, number, index, Token(token_id), reason)
