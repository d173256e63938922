"""How far a request that came straight to a decode worker has got: tokens in order, each once, over two attempts. Pure."""

from collections.abc import Iterable
from dataclasses import replace

from kvrelay.work import FinishReason, SequenceToken, Token, Work, WorkId


class Continuation:
    """One request's tokens.

    Args:
        work: its first attempt.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.num_cached_tokens = 0
        """Prompt tokens whose KV was here."""
        self._emitted: dict[int, list[Token]] = {number: [] for number in work.sequences}
        self._early: dict[tuple[int, int], SequenceToken] = {}
        """Behind one that has not come: the first token may come later than what the push led to."""
        self._reasons: dict[int, FinishReason] = {}

    @property
    def ended(self) -> bool:
        """Whether all sequences have."""
        return len(self._reasons) == len(self._emitted)

    @property
    def reasons(self) -> list[FinishReason]:
        """Why each sequence ended; all have."""
        return [self._reasons[number] for number in sorted(self._emitted)]

    def add(self, tokens: Iterable[SequenceToken]) -> dict[int, list[Token]]:
        """Takes what a worker says of the current attempt; what is new and next, by sequence."""
        for token in tokens:
            if token.work_id == self.work.work_id:
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
        """The next attempt: prompt and what was emitted. For requests of one sequence.

        Args:
            deadline_ms: what is left of it.
        """
        (emitted,) = self._emitted.values()
        self._early.clear()
        prompt = self.work.token_ids[: self.work.num_prompt_tokens]
        work_id = WorkId(self.work.work_id.request_id, self.work.work_id.attempt + 1)
        token_ids = (*prompt, *(token.token_id for token in emitted))
        self.work = replace(self.work, work_id=work_id, token_ids=token_ids, deadline_ms=deadline_ms)
