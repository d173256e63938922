"""The output of one request: an append-only log of frames with one terminal.

    Accepted, Delta, Delta, ... , Finished          succeeded
    Accepted, Delta, Delta, ...     and an error    failed, cancelled or expired

Bounded by max_tokens and n.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from gateway.streaming.frames import DeltaFrame, Frame, accepted_frame, finished_frame, is_wanted, token_ids
from gateway.streaming.write_throttle import WriteThrottle
from kvrelay.core.job import FinishReason, Token
from kvrelay.core.timeline import Phases
from kvrelay.errors import KvrelayError

MAX_FRAMES_PER_BATCH = 256
"""Bounds the message by which a late reader catches up."""


class RequestOutput:
    """A takeover passes the `frames` that earlier gateways emitted."""

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        self.frames: list[Frame] = list(frames)
        self.num_output_tokens = sum(len(frame.tokens) for frame in self.frames if isinstance(frame, DeltaFrame))
        self.ended = False
        self.error: KvrelayError | None = None
        self._waiting_for_change: list[asyncio.Future[None]] = []
        self._waiting_for_end: list[asyncio.Future[None]] = []

    def finish_reasons(self) -> dict[int, FinishReason]:
        """Of sequences that ended."""
        deltas = (frame for frame in self.frames if isinstance(frame, DeltaFrame))
        return {delta.sequence: delta.finish_reason for delta in deltas if delta.finish_reason is not None}

    def emitted_token_ids(self, num_sequences: int) -> list[list[int]]:
        return token_ids(self.frames, num_sequences)

    def append_accepted(self, request_id: str, model: str, num_prompt_tokens: int, seed: int) -> None:
        self._append(accepted_frame(request_id, model, num_prompt_tokens, seed))

    def append_delta(self, sequence: int, index: int, token: Token, text: str, reason: FinishReason | None) -> None:
        self.num_output_tokens += 1
        self._append(DeltaFrame(sequence, index, (token,), text, reason))

    def finish(
        self, reasons: Sequence[FinishReason], num_prompt_tokens: int, num_cached_tokens: int, phases: Phases
    ) -> None:
        self._append(
            finished_frame(reasons, num_prompt_tokens, self.num_output_tokens, num_cached_tokens, phases), last=True
        )

    def fail(self, error: KvrelayError) -> None:
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
        throttle: WriteThrottle | None = None,
        on_read: Callable[[int], None] = lambda position: None,
    ) -> AsyncIterator[list[Frame]]:
        """Yields frames in batches until the end.

        Args:
            coalesce_s: least time between two batches, except the first and the last.
            throttle: acquired before each batch that is not coalesced.
            on_read: called with the number of frames read, when the next ones are asked for.

        Raises:
            KvrelayError: the error that ended the request.
        """
        loop = asyncio.get_running_loop()
        position = 0
        while position < len(self.frames) or not self.ended:
            if position == len(self.frames):
                await self._wait(self._waiting_for_change)
            if throttle is not None and not coalesce_s:  # coalescing batches already
                await throttle.acquire()
            batch = self.frames[position : position + MAX_FRAMES_PER_BATCH]
            position += len(batch)
            due = loop.time() + coalesce_s if coalesce_s else 0.0
            wanted = batch if from_index == 0 else [frame for frame in batch if is_wanted(frame, from_index)]
            if wanted:
                yield wanted
            on_read(position)
            if coalesce_s and not self.ended and batch and isinstance(batch[-1], DeltaFrame):
                await self._wait(self._waiting_for_end, due - loop.time())
        if self.error is not None:
            raise self.error

    async def _wait(self, waiting: list[asyncio.Future[None]], timeout_s: float | None = None) -> None:
        """Uses plain futures, because all tokens pass here and an Event costs more."""
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
