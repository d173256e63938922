"""The output of one request as its clients get it: an append-only list of frames and one terminal, read by any number of readers.

    Accepted, Delta, Delta, ... , Finished          succeeded
    Accepted, Delta, Delta, ...     and an error    failed, cancelled or expired: the error becomes the status

Bounded by max_tokens and n. Knows no worker and no store.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from kvrelay.errors import KvrelayError
from kvrelay.telemetry import Phases
from kvrelay.v1 import inference_pb2
from kvrelay.wire import finish_reason_from_pb, finish_reason_to_pb, token_to_pb
from kvrelay.work import FinishReason, Token

Frame = inference_pb2.GenerateResponse


class RequestOutput:
    """Frames of one request.

    Args:
        frames: what earlier gateways have emitted, when the request is taken over.
    """

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self.frames: list[Frame] = list(frames)
        self.num_output_tokens = sum(len(frame.delta.tokens) for frame in self.frames if frame.HasField("delta"))
        """Tokens of all deltas so far."""
        self.ended = False
        self.error: KvrelayError | None = None
        # Replaced with every change, so that each reader waits for the one after what it has seen.
        self._changed = asyncio.Event()

    def finish_reasons(self) -> dict[int, FinishReason]:
        """Why each sequence ended that has."""
        deltas = [frame.delta for frame in self.frames if frame.HasField("delta")]
        reasons = ((delta.sequence, finish_reason_from_pb(delta.finish_reason)) for delta in deltas)
        return {sequence: reason for sequence, reason in reasons if reason is not None}

    def emitted_token_ids(self, num_sequences: int) -> list[list[int]]:
        """Token ids of each sequence so far."""
        token_ids: list[list[int]] = [[] for _ in range(num_sequences)]
        for frame in self.frames:
            if frame.HasField("delta"):
                token_ids[frame.delta.sequence].extend(token.token_id for token in frame.delta.tokens)
        return token_ids

    def append_accepted(self, request_id: str, model: str, num_prompt_tokens: int, seed: int) -> None:
        accepted = inference_pb2.Accepted(request_id=request_id, model=model, num_prompt_tokens=num_prompt_tokens, seed=seed)
        self._append(Frame(accepted=accepted))

    def append_delta(self, sequence: int, index: int, token: Token, text: str, reason: FinishReason | None) -> None:
        delta = inference_pb2.Delta(
            sequence=sequence, index=index, tokens=[token_to_pb(token)], text=text, finish_reason=finish_reason_to_pb(reason)
        )
        self.num_output_tokens += 1
        self._append(Frame(delta=delta))

    def finish(self, reasons: Sequence[FinishReason], num_prompt_tokens: int, num_cached_tokens: int, phases: Phases) -> None:
        """Ends the output with success."""
        usage = inference_pb2.Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=num_cached_tokens,
        )
        times = inference_pb2.Phases(**{name: getattr(phases, name) for name in Phases.__slots__})
        finish_reasons = [finish_reason_to_pb(reason) for reason in reasons]
        self._append(Frame(finished=inference_pb2.Finished(finish_reasons=finish_reasons, usage=usage, phases=times)), last=True)

    def fail(self, error: KvrelayError) -> None:
        """Ends the output with an error."""
        assert not self.ended, "exactly one terminal"
        self.error = error
        self.ended = True
        self._notify()

    def _append(self, frame: Frame, *, last: bool = False) -> None:
        assert not self.ended, "nothing follows the terminal"
        self.frames.append(frame)
        self.ended = last
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self, from_index: int = 0) -> AsyncIterator[Frame]:
        """All frames but deltas before `from_index`, then those that come, until the end.

        Raises:
            KvrelayError: the request ended with it.
        """
        position = 0
        while True:
            changed = self._changed
            while position < len(self.frames):
                frame = self.frames[position]
                position += 1
                if is_wanted(frame, from_index):
                    yield frame
            if self.ended:
                break
            await changed.wait()
        if self.error is not None:
            raise self.error


def is_wanted(frame: Frame, from_index: int) -> bool:
    """Whether a reader that asked for outputs from that index on gets the frame."""
    return not frame.HasField("delta") or frame.delta.index >= from_index
