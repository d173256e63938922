"""Streams a request that another gateway runs or ran, from its log in the store; takes it over when that gateway is dead."""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from gateway.output_frames import Frame, decode_frame, is_wanted
from gateway.relay import Relay
from gateway.takeover import take_over
from kvrelay.error_status import error_of_reason
from kvrelay.errors import CancelledRequestError, DeadlineError, KvrelayError, UnreadableStateError
from kvrelay.request_record import RequestRecord, RequestSummary
from kvrelay.request_state import RequestState, is_terminal
from kvrelay.worker_registry import MemberRole

FOLLOW_WAIT_MS = 500
FRAMES_PER_READ = 256
OVERDUE_TIMEOUT_S = 5.0
"""How long past its deadline a request of a living gateway is followed."""


class FrameReader(Protocol):
    """One client's view of a request's output."""

    def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Frames until the end, each time all that there are; raises the error that the request ended with."""

    def close(self) -> None:
        """The client is gone. Idempotent."""


def open_reader(relay: Relay, request_id: str, from_index: int = 0) -> FrameReader:
    """A reader of a request, wherever it runs.

    Args:
        relay: this gateway.
        request_id: the request; whether it exists shows with the first frame.
        from_index: first output index wanted.
    """
    runner = relay.requests.find(request_id)
    if runner is not None:
        return runner.open_reader(from_index)
    return StoredOutputReader(relay, request_id, from_index)


class StoredOutputReader:
    """Follows the log in the store, and goes on with a request of this gateway when it had to be taken over."""

    def __init__(self, relay: Relay, request_id: str, from_index: int) -> None:
        self._relay = relay
        self._request_id = request_id
        self._from_index = from_index
        self._local: FrameReader | None = None
        self._overdue_since: float | None = None

    def close(self) -> None:
        if self._local is not None:
            self._local.close()

    async def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Frames until the end. What comes from the log comes in batches by itself.

        Raises:
            RequestNotFoundError: no such request.
            UnavailableError: the store does not answer.
            UnreadableStateError: what it holds is no output, or no end that this version knows.
            KvrelayError: the request ended with it.
        """
        position = 0
        while True:
            data, state = await self._relay.store.read_frames(self._request_id, position, FRAMES_PER_READ, FOLLOW_WAIT_MS)
            position += len(data)
            if wanted := [frame for frame in map(decode_frame, data) if is_wanted(frame, self._from_index)]:
                yield wanted
            if is_terminal(state):
                break
            if not data and await self._take_over_if_orphaned():
                assert self._local is not None
                async for frames in _skip(self._local.batches(coalesce_s), position, self._from_index):
                    yield frames
                return
        record = await self._relay.store.get(self._request_id)
        if record is not None and record.state is not RequestState.SUCCEEDED:
            raise error_of_record(record)

    async def _take_over_if_orphaned(self) -> bool:
        record = await self._relay.store.get(self._request_id)
        if record is None or is_terminal(record.state):
            return False
        runner = self._relay.requests.find(self._request_id)
        if runner is None:
            if await _is_alive(self._relay, record.gateway_id):
                self._check_progress(record)
                return False
            runner = await take_over(self._relay, record)
        if runner is None:
            return False
        self._local = runner.open_reader()
        return True

    def _check_progress(self, record: RequestRecord) -> None:
        """Nothing is followed for ever: raises DeadlineError when the owner, though alive, does not end an expired request."""
        now = asyncio.get_running_loop().time()
        if record.remaining_ms > 0:
            self._overdue_since = None
        elif self._overdue_since is None:
            self._overdue_since = now
        elif now - self._overdue_since > OVERDUE_TIMEOUT_S:
            raise DeadlineError("the request's deadline has passed, and its gateway has not written its end")


async def _skip(batches: AsyncIterator[list[Frame]], count: int, from_index: int) -> AsyncIterator[list[Frame]]:
    """What follows the first `count` frames, as far as it is wanted."""
    async for frames in batches:
        rest, count = frames[count:], max(count - len(frames), 0)
        if wanted := [frame for frame in rest if is_wanted(frame, from_index)]:
            yield wanted


async def _is_alive(relay: Relay, gateway_id: str) -> bool:
    if gateway_id == relay.gateway_id:  # what this gateway owns and does not run is orphaned
        return False
    has_lease = any(member.instance_id == gateway_id for member in relay.members(MemberRole.GATEWAY))
    return has_lease and not await relay.peers.is_gone(gateway_id)


def error_of_record(record: RequestSummary) -> KvrelayError:
    """The error that a request ended with. A reason that this version does not know says no more than the state."""
    error = error_of_reason(record.error_reason, record.error_message)
    if error is not None:
        return error
    match record.state:
        case RequestState.CANCELLED:
            return CancelledRequestError("the request was cancelled")
        case RequestState.EXPIRED:
            return DeadlineError("the request's deadline passed before it was done")
    problem = "the request failed, and what the state store holds of the reason cannot be read; send it again as a new one"
    return UnreadableStateError(problem)
