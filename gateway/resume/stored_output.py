"""Streams another gateway's request: from the store, by taking it over, or through its owner."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from gateway.requests.known_requests import KnownRequests
from gateway.requests.registry import RunningRequests
from gateway.requests.runner import RequestRunner
from gateway.resume.forwarded_output import ForwardedOutputReader
from gateway.resume.takeover import FRAMES_PER_READ, Takeovers
from gateway.state.other_gateways import OtherGateways
from gateway.streaming.frames import EventFrame, Frame, decode_frame, is_wanted
from kvrelay.core.bounds import is_request_id
from kvrelay.core.quoting import quoted
from kvrelay.core.request_state import RequestState, is_terminal
from kvrelay.errors import (
    CancelledRequestError,
    DeadlineError,
    KvrelayError,
    RequestNotFoundError,
    UnreadableStateError,
)
from kvrelay.state.request_record import RequestRecord, RequestSummary
from kvrelay.state.state_store import StateStore
from kvrelay.wire.errors import error_of_reason

FOLLOW_WAIT_MS = 500
OVERDUE_TIMEOUT_S = 5.0
"""How long a living gateway's expired request is followed."""


class FrameReader(Protocol):
    def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Raises the error that the request ended with."""

    def close(self) -> None:
        """Idempotent."""


class RequestOutputs:
    def __init__(
        self,
        running: RunningRequests,
        known: KnownRequests,
        store: StateStore,
        gateways: OtherGateways,
        takeovers: Takeovers,
    ) -> None:
        self._running = running
        self._known = known
        self._store = store
        self._gateways = gateways
        self._takeovers = takeovers

    async def open_reader(self, request_id: str, from_index: int = 0, *, forwarded: bool = False) -> FrameReader:
        """`forwarded`: another gateway asks.

        Raises RequestNotFoundError, here or at the first frame.
        """
        runner = self._known.find_runner(request_id)
        if runner is not None:
            return runner.open_reader(from_index)
        await self._known.check_stored(request_id)
        record = None if forwarded else await self._store.get(request_id)
        if record is not None and (owner := await self._only_holder(record)) is not None:
            timeout_s = record.remaining_ms / 1000 + OVERDUE_TIMEOUT_S
            return ForwardedOutputReader(self._gateways, owner, request_id, from_index, timeout_s)
        return StoredOutputReader(self._store, request_id, from_index, self._take_over_if_orphaned)

    async def _only_holder(self, record: RequestRecord) -> str | None:
        """The address of the gateway that alone has the content."""
        if record.keeps_output or is_terminal(record.state) or not await self._gateways.is_alive(record.gateway_id):
            return None
        return self._gateways.address_of(record.gateway_id)

    async def exists(self, request_id: str) -> bool:
        return is_request_id(request_id) and await self._known.find(request_id) is not None

    async def _take_over_if_orphaned(self, record: RequestRecord) -> RequestRunner | None:
        runner = self._running.find(record.request_id)
        # Without content no gateway can go on with it; a sweeper ends it.
        if runner is not None or not record.keeps_output or await self._gateways.is_alive(record.gateway_id):
            return runner
        return await self._takeovers.take_over(record)


class StoredOutputReader:
    """Follows the log in the store, then the runner once this gateway has one.

    `take_over` returns a runner if the owner is dead and this gateway was first.
    """

    def __init__(
        self,
        store: StateStore,
        request_id: str,
        from_index: int,
        take_over: Callable[[RequestRecord], Awaitable[RequestRunner | None]],
    ) -> None:
        self._store = store
        self._request_id = request_id
        self._from_index = from_index
        self._take_over = take_over
        self._local: FrameReader | None = None
        self._overdue_since: float | None = None

    def close(self) -> None:
        if self._local is not None:
            self._local.close()

    async def batches(self, coalesce_s: float = 0.0) -> AsyncIterator[list[Frame]]:
        """Raises:
        RequestNotFoundError: no such request, or its output is not kept.
        UnavailableError, UnreadableStateError: the store cannot be read.
        KvrelayError: the request ended with it.
        """
        position, has_end = 0, False
        while True:
            data, state = await self._store.read_frames(self._request_id, position, FRAMES_PER_READ, FOLLOW_WAIT_MS)
            position += len(data)
            frames = [decode_frame(each) for each in data]
            has_end = has_end or any(isinstance(frame, EventFrame) and frame.finished for frame in frames)
            if wanted := [frame for frame in frames if is_wanted(frame, self._from_index)]:
                yield wanted
            if is_terminal(state):
                break
            if not data and (runner := await self._find_runner()) is not None:
                self._local = runner.open_reader()
                async for rest in _skip(self._local.batches(coalesce_s), position, self._from_index):
                    yield rest
                return
        record = await self._store.get(self._request_id)
        if record is not None and record.state is not RequestState.SUCCEEDED:
            raise error_of_record(record)
        if not has_end:
            raise RequestNotFoundError(
                f"the output of request {quoted(self._request_id)} is not kept, because the request was neither "
                "resumable nor had an idempotency key; send it as resumable, or start gateways with --keep-outputs"
            )

    async def _find_runner(self) -> RequestRunner | None:
        record = await self._store.get(self._request_id)
        if record is None or is_terminal(record.state):
            return None
        runner = await self._take_over(record)
        if runner is None:
            self._check_progress(record)
        return runner

    def _check_progress(self, record: RequestRecord) -> None:
        """Raises DeadlineError if a living owner does not end the request."""
        now = asyncio.get_running_loop().time()
        if record.remaining_ms > 0:
            self._overdue_since = None
        elif self._overdue_since is None:
            self._overdue_since = now
        elif now - self._overdue_since > OVERDUE_TIMEOUT_S:
            raise DeadlineError("the request's deadline has passed, and its gateway has not written its end")


async def _skip(batches: AsyncIterator[list[Frame]], count: int, from_index: int) -> AsyncIterator[list[Frame]]:
    async for frames in batches:
        rest, count = frames[count:], max(count - len(frames), 0)
        if wanted := [frame for frame in rest if is_wanted(frame, from_index)]:
            yield wanted


def error_of_record(record: RequestSummary) -> KvrelayError:
    """Falls back to the state where the reason is unknown."""
    error = error_of_reason(record.error_reason, record.error_message)
    if error is not None:
        return error
    match record.state:
        case RequestState.CANCELLED:
            return CancelledRequestError("the request was cancelled")
        case RequestState.EXPIRED:
            return DeadlineError("the request's deadline passed before it was done")
    problem = (
        "the request failed, and what the state store holds of the reason cannot be read; send it again as a new one"
    )
    return UnreadableStateError(problem)
