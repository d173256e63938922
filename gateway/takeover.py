"""Continues the request of a dead gateway here: same prompt, same seed, from the next index on."""

import asyncio
import contextlib

import structlog

from gateway.generation_request import GenerationRequest
from gateway.output_frames import EventFrame, decode_frame
from gateway.relay import Relay
from gateway.request_output import RequestOutput
from gateway.request_runner import RequestRunner
from kvrelay.errors import PreconditionError
from kvrelay.request_record import RequestRecord
from kvrelay.trace_context import current_trace, log_fields

FRAMES_PER_READ = 256

_log = structlog.get_logger(__name__)


async def take_over(relay: Relay, seen: RequestRecord) -> RequestRunner | None:
    """Makes a dead gateway's request this gateway's and runs it on. Several callers at once share one takeover.

    Returns:
        None when another gateway was faster, or the request ended meanwhile.

    Raises:
        UnavailableError: the store does not answer, or this gateway is shutting down.
        ModelNotFoundError: no worker serves its model.
    """
    pending = relay.takeovers.get(seen.request_id)
    if pending is None:
        pending = asyncio.ensure_future(_take_over(relay, seen))
        relay.takeovers[seen.request_id] = pending
        pending.add_done_callback(lambda _: relay.takeovers.pop(seen.request_id))
    return await asyncio.shield(pending)


async def _take_over(relay: Relay, seen: RequestRecord) -> RequestRunner | None:
    relay.check_open()
    limits = await relay.models.wait_and_select(seen.model, seen.remaining_ms / 1000)
    with contextlib.suppress(PreconditionError):  # a model without a tokenizer has output without text
        await relay.tokenizers.get(limits.model.fingerprint)
    record = await relay.store.take_over(seen.request_id, seen.gateway_id, seen.attempt)
    if record is None:
        return None
    about = log_fields(record.request_id, record.attempt, current_trace())
    _log.info("took a request over", from_gateway=seen.gateway_id, **about)
    now = asyncio.get_running_loop().time()
    request = GenerationRequest(
        request_id=record.request_id,
        model=record.model,
        fingerprint=limits.model.fingerprint,
        prompt_token_ids=record.prompt_token_ids,
        sampling=record.sampling,
        tenant=record.tenant,
        submit_time=now,
        deadline=now + record.remaining_ms / 1000,
        resumable=True,
    )
    frames = [decode_frame(data) for data in await _all_frames(relay, record.request_id)]
    # A Finished without the end of its state: the end is made again.
    frames = [frame for frame in frames if not (isinstance(frame, EventFrame) and frame.finished)]
    return relay.continue_request(request, record, RequestOutput(frames))


async def _all_frames(relay: Relay, request_id: str) -> list[bytes]:
    frames: list[bytes] = []
    while True:
        data, _ = await relay.store.read_frames(request_id, len(frames), FRAMES_PER_READ)
        if not data:
            return frames
        frames.extend(data)
