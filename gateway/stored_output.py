"""Streams a request that another gateway runs or ran, from its log in the store; takes it over when that gateway is dead."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from gateway.generation_request import GenerationRequest
from gateway.relay import Relay
from gateway.request_output import Frame, RequestOutput, is_wanted
from gateway.request_runner import RequestRunner
from kvrelay.error_status import error_of
from kvrelay.errors import ERROR_DOMAIN, KvrelayError, RequestNotFoundError, UnavailableError
from kvrelay.request_record import RequestRecord, RequestSummary
from kvrelay.request_state import RequestState, is_terminal
from kvrelay.worker_registry import MemberRole

FOLLOW_WAIT_MS = 500
FRAMES_PER_READ = 256
APPEARANCE_TIMEOUT_S = 3.0
"""How long a request may be unknown to the store that its owner is just about to write."""

_log = structlog.get_logger(__name__)


class FrameReader(Protocol):
    """One client's view of a request's output."""

    def frames(self) -> AsyncIterator[Frame]:
        """Frames until the end; raises the error that the request ended with."""

    def close(self) -> None:
        """The client is gone. Idempotent."""


def open_reader(relay: Relay, request_id: str, from_index: int = 0, *, may_appear: bool = False) -> FrameReader:
    """A reader of a request, wherever it runs.

    Args:
        relay: this gateway.
        request_id: the request; whether it exists shows with the first frame.
        from_index: first output index wanted.
        may_appear: the request may not be in the store yet.
    """
    runner = relay.requests.find(request_id)
    if runner is not None:
        return runner.open_reader(from_index)
    return StoredOutputReader(relay, request_id, from_index, may_appear=may_appear)


class StoredOutputReader:
    """Follows the log in the store, and goes on with a request of this gateway when it had to be taken over."""

    def __init__(self, relay: Relay, request_id: str, from_index: int, *, may_appear: bool = False) -> None:
        self._relay = relay
        self._request_id = request_id
        self._from_index = from_index
        self._may_appear = may_appear
        self._local: FrameReader | None = None

    def close(self) -> None:
        if self._local is not None:
            self._local.close()

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames until the end.

        Raises:
            RequestNotFoundError: no such request.
            UnavailableError: the store does not answer.
            KvrelayError: the request ended with it.
        """
        position = 0
        while True:
            data, state = await self._read(position)
            for frame in map(Frame.FromString, data):
                position += 1
                if is_wanted(frame, self._from_index):
                    yield frame
            if is_terminal(state):
                break
            if not data and await self._take_over_if_orphaned():
                assert self._local is not None
                async for frame in _skip(self._local.frames(), position, self._from_index):
                    yield frame
                return
        record = await self._relay.store.get(self._request_id)
        if record is not None and record.state is not RequestState.SUCCEEDED:
            raise error_of_record(record)

    async def _read(self, position: int) -> tuple[list[bytes], RequestState]:
        give_up = asyncio.get_running_loop().time() + APPEARANCE_TIMEOUT_S
        while True:
            try:
                return await self._relay.store.read_frames(self._request_id, position, FRAMES_PER_READ, FOLLOW_WAIT_MS)
            except RequestNotFoundError:
                if not self._may_appear or asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(0.05)

    async def _take_over_if_orphaned(self) -> bool:
        record = await self._relay.store.get(self._request_id)
        if record is None or is_terminal(record.state):
            return False
        if record.gateway_id == self._relay.gateway_id:
            runner = self._relay.requests.find(self._request_id)
        elif _is_alive(self._relay, record.gateway_id):
            return False
        else:
            runner = await take_over(self._relay, record)
        if runner is None:
            return False
        self._local = runner.open_reader()
        return True


async def take_over(relay: Relay, seen: RequestRecord) -> RequestRunner | None:
    """Makes a dead gateway's request this gateway's and runs it on.

    Returns:
        None when another gateway was faster, or the request ended meanwhile.

    Raises:
        UnavailableError: the store does not answer, or this gateway is shutting down.
        ModelNotFoundError: no worker serves its model.
    """
    relay.check_open()
    limits = await relay.models.wait_and_select(seen.model, seen.remaining_ms / 1000)
    await relay.tokenizers.get(limits.model.fingerprint)
    record = await relay.store.take_over(seen.request_id, seen.gateway_id, seen.attempt)
    if record is None:
        return None
    _log.info("took a request over", request_id=record.request_id, from_gateway=seen.gateway_id, attempt=record.attempt)
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
    frames = [Frame.FromString(data) for data in await _all_frames(relay, record.request_id)]
    return relay.continue_request(request, record, RequestOutput(frames))


async def _all_frames(relay: Relay, request_id: str) -> list[bytes]:
    frames: list[bytes] = []
    while True:
        data, _ = await relay.store.read_frames(request_id, len(frames), FRAMES_PER_READ)
        if not data:
            return frames
        frames.extend(data)


async def _skip(frames: AsyncIterator[Frame], count: int, from_index: int) -> AsyncIterator[Frame]:
    """What follows the first `count` frames, as far as it is wanted."""
    position = 0
    async for frame in frames:
        position += 1
        if position > count and is_wanted(frame, from_index):
            yield frame


def _is_alive(relay: Relay, gateway_id: str) -> bool:
    return any(member.instance_id == gateway_id for member in relay.members(MemberRole.GATEWAY))


def error_of_record(record: RequestSummary) -> KvrelayError:
    """The error that a request ended with."""
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=record.error_reason, domain=ERROR_DOMAIN))
    if not record.error_reason:
        return UnavailableError(f"the request ended as {record.state.value}")
    return error_of(Status(message=record.error_message, details=[detail]))
