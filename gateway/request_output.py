"""The output of one request as its clients get it: an append-only list of frames and one terminal, read by any number of readers.

    Accepted, Delta, Delta, ... , Finished          succeeded
    Accepted, Delta, Delta, ...     and an error    failed, cancelled or expired: the error becomes the status

Bounded by max_tokens and n. Knows no worker and no store.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from gateway.output_frames import DeltaFrame, Frame, accepted_frame, finished_frame, is_wanted, token_ids
from gateway.turnstile import Turnstile
from kvrelay.errors import KvrelayError
from kvrelay.telemetry import Phases
from kvrelay.work import FinishReason, Token

MAX_FRAMES_PER_BATCH = 256
"""A reader that is far behind catches up in messages of a bounded size."""


class RequestOutput:
    """Frames of one request, one for each token.

    Args:
        frames: what earlier gateways have emitted, when the request is taken over.
    """

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self.frames: list[Frame] = list(frames)
        self.num_output_tokens = sum(len(frame.tokens) for frame in self.frames if isinstance(frame, DeltaFrame))
        """Tokens of all deltas so far."""
        self.ended = False
        self.error: KvrelayError | None = None
        self._waiting_for_change: list[asyncio.Future[None]] = []
        self._waiting_for_end: list[asyncio.Future[None]] = []

    def finish_reasons(self) -> dict[int, FinishReason]:
        """Why each sequence ended that has."""
        deltas = (frame for frame in self.frames if isinstance(frame, DeltaFrame))
        return {delta.sequence: delta.finish_reason for delta in deltas if delta.finish_reason is not None}

    def emitted_token_ids(self, num_sequences: int) -> list[list[int]]:
        """Token ids of each sequence so far."""
        return token_ids(self.frames, num_sequences)

    def append_accepted(self, request_id: str, model: str, num_prompt_tokens: int, seed: int) -> None:
        self._append(accepted_frame(request_id, model, num_prompt_tokens, seed))

    def append_delta(self, sequence: int, index: int, token: Token, text: str, reason: FinishReason | None) -> None:
        self.num_output_tokens += 1
        self._append(DeltaFrame(sequence, index, (token,), text, reason))

    def finish(self, reasons: Sequence[FinishReason], num_prompt_tokens: int, num_cached_tokens: int, phases: Phases) -> None:
        """Ends the output with success."""
        self._append(finished_frame(reasons, num_prompt_tokens, self.num_output_tokens, num_cached_tokens, phases), last=True)

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
        if self._waiting_for_change:
            _wake(self._waiting_for_change)
        if self.ended:
            _wake(self._waiting_for_end)

    async def read(
        self,
        from_index: int = 0,
        coalesce_s: float = 0.0,
        turnstile: Turnstile | None = None,
        note_read: Callable[[int], None] = lambda position: None,
    ) -> AsyncIterator[list[Frame]]:
        """All frames but deltas before `from_index`, then those that come, until the end; each time all that there are by then.

        Args:
            from_index: first output index wanted.
            coalesce_s: least time between two batches of deltas. Neither the first nor the last waits for it.
            note_read: called with the number of frames that are done with, when the next ones are asked for.
            turnstile: passed before each batch is gathered, where nothing is coalesced.

        Raises:
            KvrelayError: the request ended with it.
        """
        loop = asyncio.get_running_loop()
        position = 0
        while position < len(self.frames) or not self.ended:
            if position == len(self.frames):
                await self._wait(self._waiting_for_change)
            if turnstile is not None and not coalesce_s:  # what is coalesced has gathered already
                await turnstile.pass_through()
            batch = self.frames[position : position + MAX_FRAMES_PER_BATCH]
            position += len(batch)
            due = loop.time() + coalesce_s if coalesce_s else 0.0
            wanted = batch if from_index == 0 else [frame for frame in batch if is_wanted(frame, from_index)]
            if wanted:
                yield wanted
            note_read(position)
            if coalesce_s and not self.ended and batch and isinstance(batch[-1], DeltaFrame):
                await self._wait(self._waiting_for_end, due - loop.time())
        if self.error is not None:
            raise self.error

    async def _wait(self, waiting: list[asyncio.Future[None]], timeout_s: float | None = None) -> None:
        """Until those who wait there are woken, or for so long. Lighter than an Event and a timeout: all tokens pass here."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        waiting.append(future)
        if timeout_s is None:
            await future
            return
        timer = loop.call_later(timeout_s, _settle, future)
        try:
            await future
        finally:
            timer.cancel()
            if future in waiting:
                waiting.remove(future)


def _wake(waiting: list[asyncio.Future[None]]) -> None:
    for future in waiting:
        _settle(future)
    waiting.clear()


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
