"""What VllmEngine.Generate answers: chunks with new tokens when it streams, and one complete message for each sequence.

Pure; knows neither workers nor a clock. Text is the client's affair: only token ids go over this protocol.
"""

from collections.abc import Sequence

from kvrelay.vllm_engine.messages import Message, engine_pb
from kvrelay.work import FinishReason, Token

ABORT_REASON = "abort"
_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Answers:
    """Answers to one request.

    Args:
        num_prompt_tokens: length of the prompt.
        num_sequences: how many continuations were asked for.
        streams: whether chunks are wanted.
        stop_token_ids: to say which of them ended a sequence.
    """

    def __init__(self, num_prompt_tokens: int, num_sequences: int, *, streams: bool, stop_token_ids: Sequence[int] = ()) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._streams = streams
        self._stop_token_ids = frozenset(stop_token_ids)
        self._tokens: list[list[Token]] = [[] for _ in range(num_sequences)]

    @property
    def num_tokens(self) -> int:
        """Tokens so far, over all sequences."""
        return sum(map(len, self._tokens))

    def add(self, sequence: int, tokens: Sequence[Token]) -> Message | None:
        """New tokens of a sequence; the chunk to send, if any."""
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
        """The last messages of a request that succeeded, one for each sequence.

        Args:
            reasons: why each ended.
            num_cached_tokens: prompt tokens that had not to be computed.
            kv_transfer_params: JSON for whoever continues elsewhere.
        """
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
        """The last messages of a request that was aborted."""
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
    """None when none were asked for."""
    if not tokens or tokens[0].logprob is None:
        return None
    return engine_pb.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens],
        token_ids=[token.token_id for token in tokens],
        top_logprobs=[
            engine_pb.TopLogProbs(
                values=[top.logprob for top in token.top_logprobs], token_ids=[top.token_id for top in token.top_logprobs]
            )
            for token in tokens
        ],
    )
