"""A request's tokens over all attempts. Pure."""

from collections.abc import Iterable

from gateway.lifecycle.generation_request import GenerationRequest
from kvrelay.core.job import Job, JobId, SequenceToken

NUM_TOKENS_TO_PASS = 2
"""The second token proves a decode step."""


class SequenceOutputs:
    def __init__(self, request: GenerationRequest) -> None:
        num_sequences = request.sampling.n
        self.emitted: list[list[int]] = [list(ids) for ids in request.emitted] or [[] for _ in range(num_sequences)]
        self.open = set(range(num_sequences)) - request.finished_sequences
        self._request = request
        self._num_emitted_before = [len(ids) for ids in self.emitted]

    def append(self, token: SequenceToken) -> None:
        assert token.index == len(self.emitted[token.sequence]), "tokens come in order"
        self.emitted[token.sequence].append(token.token.token_id)
        if token.finish_reason is not None:
            self.open.discard(token.sequence)

    def is_done(self, job: Job) -> bool:
        return self.open.isdisjoint(job.sequences)

    def has_passed(self, job: Job) -> bool:
        """Whether each sequence ended or has two tokens of this attempt."""
        return all(
            len(self.emitted[sequence]) >= self._num_emitted_before[sequence] + NUM_TOKENS_TO_PASS
            for sequence in self.open.intersection(job.sequences)
        )

    def begin_attempt(self, attempt: int, *, isolated: bool) -> Iterable[Job]:
        """Returns one job for all sequences while none has a token, else one for each."""
        self._num_emitted_before = [len(ids) for ids in self.emitted]
        num_sequences = len(self.emitted)
        if not any(self.emitted) and len(self.open) == num_sequences:
            return [self._make_job(attempt, 0, num_sequences, isolated)]
        return [self._make_job(attempt, sequence, 1, isolated) for sequence in sorted(self.open)]

    def _make_job(self, attempt: int, first_sequence: int, num_sequences: int, isolated: bool) -> Job:
        request = self._request
        return Job(
            job_id=JobId(request.request_id, attempt, first_sequence),
            token_ids=request.prompt_token_ids + tuple(self.emitted[first_sequence]),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_sequences=num_sequences,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
            deadline_ms=0,
            isolated=isolated,
            share_weight=request.share_weight,
        )
