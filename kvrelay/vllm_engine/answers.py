"""What VllmEngine.Generate answers: chunks when it streams, then one message per sequence.

Pure. Only token ids go over this protocol.
"""

from collections.abc import Sequence

from kvrelay.core.job import FinishReason, Token
from kvrelay.vllm_engine.messages import Message, engine_pb

ABORT_REASON = "abort"
_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Answers:
    """Makes chunks only if it `streams`."""

    def __init__(
        self, num_prompt_tokens: int, num_sequences: int, *, streams: bool, stop_token_ids: Sequence[int] = ()
    ) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._streams = streams
        self._stop_token_ids = frozenset(stop_token_ids)
        self._tokens: list[list[Token]] = [[] for _ in range(num_sequences)]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens))

    def add(self, sequence: int, tokens: Sequence[Token]) -> Message | None:
        """Returns the chunk to send, if any."""
        self._tokens[sequence].extend(tokens)
        if not self._streams or not tokens:
            return None
        chunk = engine_pb.GenerateStreamChunk(
            token_ids=[token.token_id for token in tokens],
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(self._tokens[sequence]),
            output_logprobs=_logprobs(tokens),
            index=sequence,
        )
        return engine_pb.GenerateResponse(chunk=chunk)

    def complete(
        self, reasons: Sequence[FinishReason], num_cached_tokens: int, kv_transfer_params: str | None = None
    ) -> list[Message]:
        """One message per sequence. `kv_transfer_params` is JSON for the worker that continues."""
        answers = []
        for sequence, reason in enumerate(reasons):
            answer = self._complete(sequence, _REASONS[reason], num_cached_tokens)
            tokens = self._tokens[sequence]
            if reason is FinishReason.STOP and tokens and tokens[-1].token_id in self._stop_token_ids:
                answer.complete.matched_token_id = tokens[-1].token_id
            if kv_transfer_params is not None:
                answer.complete.kv_transfer_params_json = kv_transfer_params
            answers.append(answer)
        return answers

    def aborted(self) -> list[Message]:
        return [self._complete(sequence, ABORT_REASON, 0) for sequence in range(len(self._tokens))]

    def _complete(self, sequence: int, reason: str, num_cached_tokens: int) -> Message:
        tokens = self._tokens[sequence]
        complete = engine_pb.GenerateComplete(
            output_ids=[token.token_id for token in tokens],
            finish_reason=reason,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(tokens),
            cached_tokens=num_cached_tokens,
            output_logprobs=_logprobs(tokens),
            index=sequence,
        )
        return engine_pb.GenerateResponse(complete=complete)


def _logprobs(tokens: Sequence[Token]) -> Message | None:
    if not tokens or tokens[0].logprob is None:
        return None
    return engine_pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens],
        token_ids=[token.token_id for token in tokens],
        top_logprobs=[
            engine_pb.TopLogProbs(
                values=[top.logprob for top in token.top_logprobs],
                token_ids=[top.token_id for top in token.top_logprobs],
            )
            for token in tokens
        ],
    )
