"""Continues a dead gateway's request: same prompt, same seed, next index."""

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog

from gateway.lifecycle.generation_request import GenerationRequest
from gateway.requests.prompt_preparation import PromptPreparation
from gateway.requests.registry import RunningRequests
from gateway.requests.runner import RequestRunner
from gateway.requests.starter import RequestStarter
from gateway.streaming.frames import EventFrame, decode_frame
from gateway.streaming.output_log import RequestOutput
from kvrelay.core.backoff import Backoff
from kvrelay.core.request_state import RequestState
from kvrelay.core.trace_context import current_trace, log_fields
from kvrelay.errors import PreconditionError, UnavailableError, UnreadableStateError
from kvrelay.state.request_record import RequestRecord
from kvrelay.state.state_store import StateStore

FRAMES_PER_READ = 256
PATIENCE_S = 5.0
"""How long a client waits for a takeover, which goes on without it."""
PATIENCE_RETRY_MS = 1000
FIRST_RETRY_DELAY_S = 0.05
MAX_RETRY_DELAY_S = 1.0

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)


class Takeovers:
    """Several callers share one takeover of a request."""

    def __init__(
        self, starter: RequestStarter, preparation: PromptPreparation, running: RunningRequests, store: StateStore
    ) -> None:
        self._starter = starter
        self._preparation = preparation
        self._running = running
        self._store = store
        self._pending: dict[str, asyncio.Future[RequestRunner | None]] = {}

    async def take_over(self, seen: RequestRecord) -> RequestRunner | None:
        """Returns None if another gateway was faster, or the request ended.

        Raises:
            UnavailableError: the store does not answer, or this gateway is draining.
            ModelNotFoundError: no worker serves its model.
        """
        self._starter.check_open()
        limits = await self._preparation.models.wait_and_select(seen.model, seen.remaining_ms / 1000)
        # a model without a tokenizer has output without text
        with contextlib.suppress(PreconditionError):
            await self._preparation.tokenizers.get(limits.model.fingerprint)
        runner = self._running.find(seen.request_id)
        if runner is not None:  # another caller's takeover has ended meanwhile
            return runner
        pending = self._pending.get(seen.request_id)
        if pending is None:
            pending = asyncio.ensure_future(self._take_over(seen, limits.model.fingerprint))
            self._pending[seen.request_id] = pending
            pending.add_done_callback(partial(self._on_done, seen))
        await asyncio.wait([pending], timeout=PATIENCE_S)
        if not pending.done():
            message = "the state store does not answer, so the request cannot be taken over yet; resume it again"
            raise UnavailableError(message, PATIENCE_RETRY_MS)
        return await pending

    def cancel_all(self) -> None:
        for pending in self._pending.values():
            pending.cancel()

    def _on_done(self, seen: RequestRecord, pending: "asyncio.Future[RequestRunner | None]") -> None:
        del self._pending[seen.request_id]
        if not pending.cancelled() and (error := pending.exception()) is not None:
            _log.warning(
                "a request was not taken over", reason=str(error), **log_fields(seen.request_id, seen.attempt, None)
            )

    async def _take_over(self, seen: RequestRecord, fingerprint: str) -> RequestRunner | None:
        """Insists, because its first step may have made the request this gateway's."""
        deadline = asyncio.get_running_loop().time() + seen.remaining_ms / 1000
        token = secrets.token_hex(8)
        claim = partial(self._store.take_over, seen.request_id, seen.gateway_id, seen.attempt, token=token)
        record = await _insist(claim, deadline)
        if record is None:
            return None
        about = log_fields(record.request_id, record.attempt, current_trace())
        _log.info("took a request over", from_gateway=seen.gateway_id, **about)
        now = asyncio.get_running_loop().time()
        request = GenerationRequest(
            request_id=record.request_id,
            model=record.model,
            fingerprint=fingerprint,
            prompt_token_ids=record.prompt_token_ids,
            sampling=record.sampling,
            tenant=record.tenant,
            submit_time=now,
            deadline=now + record.remaining_ms / 1000,
            resumable=True,
            keeps_output=record.keeps_output,
        )
        try:
            stored = await _insist(partial(self._all_frames, record.request_id), request.deadline)
            frames = [decode_frame(data) for data in stored]
        except UnreadableStateError as error:
            fields = {"error_message": error.message, "error_reason": error.reason}
            end = partial(self._store.transition, record.request_id, record.attempt, RequestState.FAILED, fields=fields)
            await _insist(end, request.deadline)
            raise
        # A Finished whose state was never written: the end is made again.
        frames = [frame for frame in frames if not (isinstance(frame, EventFrame) and frame.finished)]
        return self._starter.continue_request(request, record, RequestOutput(frames))

    async def _all_frames(self, request_id: str) -> list[bytes]:
        frames: list[bytes] = []
        while True:
            data, _ = await self._store.read_frames(request_id, len(frames), FRAMES_PER_READ)
            if not data:
                return frames
            frames.extend(data)


async def _insist(operation: Callable[[], Awaitable[_Answer]], deadline: float) -> _Answer:
    """Repeats the operation until Redis answers or the deadline passes."""
    backoff = Backoff(FIRST_RETRY_DELAY_S, MAX_RETRY_DELAY_S, random.random)
    while True:
        try:
            return await operation()
        except UnavailableError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
            await asyncio.sleep(backoff.next_delay_s())
