"""Output of a request without a gateway, over two attempts. Pure."""

from collections.abc import Iterable
from dataclasses import replace

from kvrelay.core.job import FinishReason, Job, JobId, SequenceToken, Token


class Continuation:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.num_cached_tokens = 0
        self._emitted: dict[int, list[Token]] = {number: [] for number in job.sequences}
        self._early: dict[tuple[int, int], SequenceToken] = {}
        """Tokens that arrived before token 0, which comes over another connection."""
        self._reasons: dict[int, FinishReason] = {}

    @property
    def ended(self) -> bool:
        return len(self._reasons) == len(self._emitted)

    @property
    def reasons(self) -> list[FinishReason]:
        """Call after the end."""
        return [self._reasons[number] for number in sorted(self._emitted)]

    def add(self, tokens: Iterable[SequenceToken]) -> dict[int, list[Token]]:
        """Returns tokens of the current attempt that are new and next, by sequence."""
        for token in tokens:
            if token.job_id == self.job.job_id:
                self._early[token.sequence, token.index] = token
        new: dict[int, list[Token]] = {}
        for number, emitted in self._emitted.items():
            while number not in self._reasons and (number, len(emitted)) in self._early:
                token = self._early.pop((number, len(emitted)))
                emitted.append(token.token)
                new.setdefault(number, []).append(token.token)
                if token.finish_reason is not None:
                    self._reasons[number] = token.finish_reason
        return new

    def begin_again(self, deadline_ms: int) -> None:
        """The prompt and emitted tokens of the only sequence become the new prompt."""
        (emitted,) = self._emitted.values()
        self._early.clear()
        prompt = self.job.token_ids[: self.job.num_prompt_tokens]
        job_id = JobId(self.job.job_id.request_id, self.job.job_id.attempt + 1)
        token_ids = (*prompt, *(token.token_id for token in emitted))
        self.job = replace(self.job, job_id=job_id, token_ids=token_ids, deadline_ms=deadline_ms)
