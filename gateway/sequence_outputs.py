"""The tokens that a request's sequences have got so far, over all attempts, and which of the sequences go on. Pure."""

from collections.abc import Iterable

from gateway.lifecycle_messages import LifecycleRequest
from kvrelay.work import SequenceToken, Work, WorkId

NUM_TOKENS_TO_PASS = 2
"""With the first token the prompt was computed, with the second a decode step."""


class SequenceOutputs:
    """Output of one request.

    Args:
        request: new, or with what was emitted before it was taken over.
    """

    def __init__(self, request: LifecycleRequest) -> None:
        num_sequences = request.sampling.n
        self.emitted: list[list[int]] = [list(ids) for ids in request.emitted] or [[] for _ in range(num_sequences)]
        """Token ids of each sequence."""
        self.open = set(range(num_sequences)) - request.finished_sequences
        """Sequences that have not ended."""
        self._request = request
        self._num_emitted_before = [len(ids) for ids in self.emitted]

    def append(self, token: SequenceToken) -> None:
        """The next token of a sequence that is open."""
        assert token.index == len(self.emitted[token.sequence]), "tokens come in order"
        self.emitted[token.sequence].append(token.token.token_id)
        if token.finish_reason is not None:
            self.open.discard(token.sequence)

    def is_done(self, work: Work) -> bool:
        """Whether all sequences of the work have ended."""
        return self.open.isdisjoint(work.sequences)

    def has_passed(self, work: Work) -> bool:
        """Whether each sequence of the work has ended, or has got past a prompt and a decode step in this attempt."""
        return all(
            len(self.emitted[sequence]) >= self._num_emitted_before[sequence] + NUM_TOKENS_TO_PASS
            for sequence in self.open.intersection(work.sequences)
        )

    def begin_attempt(self, attempt: int, *, runs_alone: bool) -> Iterable[Work]:
        """The works of a new attempt: one for all sequences while none has any token; else one for each that is open."""
        self._num_emitted_before = [len(ids) for ids in self.emitted]
        num_sequences = len(self.emitted)
        if not any(self.emitted) and len(self.open) == num_sequences:
            return [self._make_work(attempt, 0, num_sequences, runs_alone)]
        return [self._make_work(attempt, sequence, 1, runs_alone) for sequence in sorted(self.open)]

    def _make_work(self, attempt: int, first_sequence: int, num_sequences: int, runs_alone: bool) -> Work:
        request = self._request
        return Work(
            work_id=WorkId(request.request_id, attempt, first_sequence),
            token_ids=request.prompt_token_ids + tuple(self.emitted[first_sequence]),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_sequences=num_sequences,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            deadline_ms=0,
            runs_alone=runs_alone,
        )
