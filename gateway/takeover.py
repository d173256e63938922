"""Continues the request of a dead gateway here: same prompt, same seed, from the next index on."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import structlog

from gateway.generation_request import GenerationRequest
from gateway.output_frames import EventFrame, decode_frame
from gateway.relay import Relay
from gateway.request_output import RequestOutput
from gateway.request_runner import RequestRunner
from kvrelay.backoff import Backoff
from kvrelay.errors import PreconditionError, UnavailableError, UnreadableStateError
from kvrelay.request_record import RequestRecord
from kvrelay.request_state import RequestState
from kvrelay.trace_context import current_trace, log_fields

FRAMES_PER_READ = 256
PATIENCE_S = 5.0
"""How long a client waits for a takeover; it goes on without one."""
PATIENCE_RETRY_MS = 1000
FIRST_RETRY_DELAY_S = 0.05
MAX_RETRY_DELAY_S = 1.0

_Answer = TypeVar("_Answer")
_log = structlog.get_logger(__name__)


async def take_over(relay: Relay, seen: RequestRecord) -> RequestRunner | None:
    """Makes a dead gateway's request this gateway's and runs it on. Several callers at once share one takeover.

    Returns:
        None when another gateway was faster, or the request ended meanwhile.

    Raises:
        UnavailableError: the store does not answer, or this gateway is shutting down.
        ModelNotFoundError: no worker serves its model.
    """
    relay.check_open()
    limits = await relay.models.wait_and_select(seen.model, seen.remaining_ms / 1000)
    with contextlib.suppress(PreconditionError):  # a model without a tokenizer has output without text
        await relay.tokenizers.get(limits.model.fingerprint)
    runner = relay.requests.find(seen.request_id)
    if runner is not None:  # another caller's takeover has come to its end meanwhile
        return runner
    pending = relay.takeovers.get(seen.request_id)
    if pending is None:
        pending = asyncio.ensure_future(_take_over(relay, seen, limits.model.fingerprint))
        relay.takeovers[seen.request_id] = pending
        pending.add_done_callback(partial(_note_done, relay, seen))
    await asyncio.wait([pending], timeout=PATIENCE_S)
    if not pending.done():
        message = "the state store does not answer, so the request cannot be taken over yet; resume it again"
        raise UnavailableError(message, PATIENCE_RETRY_MS)
    return await pending


def _note_done(relay: Relay, seen: RequestRecord, pending: "asyncio.Future[RequestRunner | None]") -> None:
    del relay.takeovers[seen.request_id]
    if not pending.cancelled() and (error := pending.exception()) is not None:
        _log.warning("a request was not taken over", reason=str(error), **log_fields(seen.request_id, seen.attempt, None))


async def _take_over(relay: Relay, seen: RequestRecord, fingerprint: str) -> RequestRunner | None:
    """From its first command on the request may be this gateway's, and others wait for its owner: so it does not give up."""
    deadline = asyncio.get_running_loop().time() + seen.remaining_ms / 1000
    token = secrets.token_hex(8)
    claim = partial(relay.store.take_over, seen.request_id, seen.gateway_id, seen.attempt, token=token)
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
    )
    try:
        stored = await _insist(partial(_all_frames, relay, record.request_id), request.deadline)
        frames = [decode_frame(data) for data in stored]
    except UnreadableStateError as error:
        fields = {"error_message": error.message, "error_reason": error.reason}
        end = partial(relay.store.transition, record.request_id, record.attempt, RequestState.FAILED, fields=fields)
        await _insist(end, request.deadline)
        raise
    # A Finished without the end of its state: the end is made again.
    frames = [frame for frame in frames if not (isinstance(frame, EventFrame) and frame.finished)]
    return relay.continue_request(request, record, RequestOutput(frames))


async def _insist(operation: Callable[[], Awaitable[_Answer]], deadline: float) -> _Answer:
    """Runs an operation of the store again and again until Redis answers; UnavailableError when the deadline has passed."""
    backoff = Backoff(FIRST_RETRY_DELAY_S, MAX_RETRY_DELAY_S)
    while True:
        try:
            return await operation()
        except UnavailableError:
            if asyncio.get_running_loop().time() >= deadline:
                raise
            await asyncio.sleep(backoff.next_delay_s())


async def _all_frames(relay: Relay, request_id: str) -> list[bytes]:
    frames: list[bytes] = []
    while True:
        data, _ = await relay.store.read_frames(request_id, len(frames), FRAMES_PER_READ)
        if not data:
            return frames
        frames.extend(data)
