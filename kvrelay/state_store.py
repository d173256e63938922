"""Request state in Redis: records, frame logs, the list of requests and idempotency keys. Knows no gRPC, no worker and no token.

Every operation is bounded by the timeout and raises:
    UnavailableError   Redis does not answer, or did not a moment ago: the breaker fails fast until a ping succeeds
    StoreFullError     Redis is out of memory and evicts nothing
    UnreadableStateError   a key holds what kvrelay did not write
"""

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog
from redis.asyncio import Redis

from kvrelay.errors import (
    FrameGapError,
    IdempotencyConflictError,
    RequestNotFoundError,
    StateLostError,
    SupersededError,
    UnreadableStateError,
)
from kvrelay.redis_connection import RedisConnection, StoreHealth
from kvrelay.request_list import RequestList, RequestPage
from kvrelay.request_record import CHANGEABLE_FIELDS, RequestRecord, decode_record, decode_state, encode_record
from kvrelay.request_state import TERMINAL_STATES, RequestState, edges_argument, paths_argument, terminal_argument
from kvrelay.trace_context import log_fields

RESTORED_FRAMES_PER_OPERATION = 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class IdempotencyClaim:
    """Who owns an idempotency key."""

    request_id: str
    """The request that the key stands for."""
    mine: bool
    """Whether that is the request that asked."""


class StateStore:
    """Request state as one gateway sees and changes it.

    Args:
        connection: shared with the worker registry; the store does not close it.
        gateway_id: instance id of the gateway, the owner of what it creates.
        retention_ms: how long an ended request is known.
    """

    def __init__(self, connection: RedisConnection, gateway_id: str, retention_ms: int = 3_600_000) -> None:
        self._connection = connection
        self._gateway_id = gateway_id
        self._retention_ms = retention_ms
        self._request_list = RequestList(connection)

    @property
    def healthy(self) -> bool:
        """Whether Redis answers, as far as is known; False while the breaker is open."""
        return self._connection.health.healthy

    @property
    def health(self) -> StoreHealth:
        """The breaker; `await health.wait_until_healthy()` to write what was kept back."""
        return self._connection.health

    async def create(self, record: RequestRecord) -> bool:
        """Writes a new request. Repeating it is harmless.

        Returns:
            False when the id is taken by another request (other attempt, state or owner); nothing is changed then.
        """
        arguments = (record.gateway_id, record.create_time_ms, record.remaining_ms, self._retention_ms, *encode_record(record))
        written = await self._connection.run_script("create", [_request_key(record.request_id)], arguments)
        if written:
            await self._list(record)
        return bool(written)

    async def transition(
        self,
        request_id: str,
        attempt: int,
        to_state: RequestState,
        *,
        new_attempt: int | None = None,
        fields: Mapping[str, str | int] | None = None,
        owner: str | None = None,
    ) -> bool:
        """Moves a request along an edge, in one compare-and-set.

        Args:
            request_id: the request.
            attempt: the attempt that the caller runs.
            to_state: where to.
            new_attempt: `attempt + 1` to try again; `to_state` is QUEUED then.
            fields: `CHANGEABLE_FIELDS` to set along.
            owner: who must own the request; default this gateway. To end a dead gateway's request, name that gateway.

        Returns:
            True when the request is there now, also when it was there already. False when the caller is a zombie: the request is
            final, further on, of a newer attempt or of another owner. Nothing is changed then.

        Raises:
            StateLostError: Redis has lost writes of this owner: the record is missing, of an older attempt, or so far behind that
                only several edges lead to the state. `restore` writes it again.
        """
        arguments = (
            owner or self._gateway_id,
            attempt,
            to_state.value,
            attempt if new_attempt is None else new_attempt,
            self._retention_ms,
            edges_argument(),
            paths_argument(),
            terminal_argument(),
            *_changes(fields or {}),
        )
        return _accepted(request_id, await self._connection.run_script("transition", _keys(request_id), arguments))

    async def restore(self, record: RequestRecord, frames: Sequence[bytes]) -> bool:
        """Writes the owner's knowledge again after Redis lost some of it. The attempt never goes back.

        Returns:
            False when Redis has a newer attempt, a final state or another owner of this attempt; nothing is changed then.
        """
        # In parts, so that no operation takes longer than it may. Until the last one, the request reads as running.
        last = max(0, (len(frames) - 1) // RESTORED_FRAMES_PER_OPERATION * RESTORED_FRAMES_PER_OPERATION)
        running = replace(record, state=RequestState.DECODING)
        for position in range(0, last, RESTORED_FRAMES_PER_OPERATION):
            part = frames[position : position + RESTORED_FRAMES_PER_OPERATION]
            if not await self._restore_part(running, position, part):
                return await self._restore_part(record, 0, ())
        written = await self._restore_part(record, last, frames[last:])
        if written:
            await self._list(record)
        return written

    async def _restore_part(self, record: RequestRecord, position: int, frames: Sequence[bytes]) -> bool:
        fields = encode_record(record)
        arguments = (
            record.gateway_id,
            record.attempt,
            record.state.value,
            record.remaining_ms,
            self._retention_ms,
            terminal_argument(),
            position,
            len(fields),
            *fields,
            *frames,
        )
        return _accepted(record.request_id, await self._connection.run_script("restore", _keys(record.request_id), arguments))

    async def append_frames(
        self, request_id: str, attempt: int, position: int, frames: Sequence[bytes], num_output_tokens: int | None = None
    ) -> int:
        """Appends to a request's frame log; frames that are there already are dropped.

        Args:
            request_id: the request.
            attempt: the attempt that made the frames.
            position: index of the first frame in the request's log.
            frames: opaque bytes each.
            num_output_tokens: what the record says from now on; None leaves it.

        Returns:
            The log's new length in frames.

        Raises:
            FrameGapError: frames before `position` are missing: Redis lost them, or the caller skipped some. `num_frames` says
                how many there are.
            StateLostError: the record is missing, or of an older attempt.
            SupersededError: the request is final, of a newer attempt or of another owner.
        """
        output = "" if num_output_tokens is None else num_output_tokens
        arguments = (self._gateway_id, attempt, position, terminal_argument(), output, *frames)
        result, *details = await self._connection.run_script("append", _keys(request_id), arguments)
        if result == b"GAP":
            raise FrameGapError(f"The log of request {request_id} ends before frame {position}; restore it.", int(details[0]))
        if not _accepted(request_id, result):
            raise SupersededError(f"Request {request_id} has ended or goes on elsewhere.")
        return int(details[0])

    async def read_frames(
        self, request_id: str, position: int, max_count: int, wait_ms: int = 0
    ) -> tuple[list[bytes], RequestState]:
        """Frames from `position` on, waiting up to `wait_ms` for the first one or for the end.

        Returns:
            At most `max_count` frames, and the state. A final state comes with the last frames only: until all were returned, an
            ended request reads as DECODING. So a final state always means that nothing follows.

        Raises:
            RequestNotFoundError: no such request, or it was forgotten.
        """
        arguments = (position, max_count, terminal_argument())
        answer = await self._connection.run_script("read", _keys(request_id), arguments)
        if len(answer) == 1 and wait_ms > 0 and decode_state(answer[0]) not in TERMINAL_STATES:
            # Frame p has the stream id (p + 1)-0: this waits for frame `position`, or for the end that may be there instead.
            await self._connection.wait_for_entry(_log_key(request_id), f"{position}-0", wait_ms)
            answer = await self._connection.run_script("read", _keys(request_id), arguments)
        if not answer:
            raise RequestNotFoundError(f"Request {request_id} is not known, or was forgotten.")
        return answer[1:], decode_state(answer[0])

    async def get(self, request_id: str) -> RequestRecord | None:
        """One request, or None."""
        stored, now_ms = await self._connection.run(lambda client: _read_record(client, request_id))
        return decode_record(stored, now_ms) if stored else None

    async def list_requests(self, page_size: int, page_token: str = "", active_only: bool = False) -> RequestPage:
        """Known requests of all gateways, newest first.

        Raises:
            InvalidRequestError: `page_token` is none of ours.
        """
        return await self._request_list.read_page(page_size, page_token, active_only)

    async def take_over(
        self, request_id: str, expected_owner: str, expected_attempt: int, new_owner: str | None = None, token: str | None = None
    ) -> RequestRecord | None:
        """Makes an active request this gateway's: attempt + 1, QUEUED.

        Args:
            request_id: the request.
            expected_owner: the dead gateway.
            expected_attempt: its attempt.
            new_owner: default this gateway.
            token: names this takeover: with the same one a repeat is the same takeover. Default a new one.

        Returns:
            The record as it is now, or None when it is not as expected, final or gone. Its frames: `read_frames`.
        """
        owner = new_owner or self._gateway_id
        arguments = (expected_owner, expected_attempt, owner, token or secrets.token_hex(8), terminal_argument())
        if not await self._connection.run_script("take_over", [_request_key(request_id)], arguments):
            return None
        record = await self.get(request_id)
        is_mine = record is not None and (record.gateway_id, record.attempt) == (owner, expected_attempt + 1)
        return record if is_mine else None

    async def claim_idempotency_key(
        self, tenant: str, key: str, body_digest: str, request_id: str, ttl_ms: int
    ) -> IdempotencyClaim:
        """Makes the key stand for this request, unless it stands for another already.

        Args:
            tenant: keys are the tenant's own.
            key: the client's key.
            body_digest: digest of the request's body.
            request_id: the request that asks.
            ttl_ms: how long the key is remembered: what is left of the deadline, plus the retention.

        Raises:
            IdempotencyConflictError: the key was used with another body.
        """
        answer = await self._connection.run_script("claim", [_idempotency_key(tenant, key)], (body_digest, request_id, ttl_ms))
        # A key that lacks one of them stands for no request: it reads as another body's.
        stored_digest, owner = ((value or b"").decode(errors="replace") for value in answer)
        if stored_digest != body_digest:
            raise IdempotencyConflictError("The idempotency key was used before with another request; use a new key.")
        return IdempotencyClaim(owner, mine=owner == request_id)

    async def release_idempotency_key(self, tenant: str, key: str, request_id: str) -> None:
        """Forgets the key when this request owns it; for a request that was not admitted after all."""
        await self._connection.run_script("release", [_idempotency_key(tenant, key)], (request_id,))

    async def _list(self, record: RequestRecord) -> None:
        time_to_live_ms = record.remaining_ms + self._retention_ms
        try:
            await self._request_list.add(record.request_id, record.create_time_ms, time_to_live_ms)
        except UnreadableStateError as error:
            about = log_fields(record.request_id, record.attempt, None)
            _log.error("a request is not in the list of requests", problem=repr(error.__cause__), **about)


def _request_key(request_id: str) -> str:
    # Braces: both keys of a request lie in one slot of a cluster, so that one script may touch both.
    return f"kvrelay:{{{request_id}}}:request"


def _log_key(request_id: str) -> str:
    return f"kvrelay:{{{request_id}}}:log"


def _keys(request_id: str) -> list[str]:
    return [_request_key(request_id), _log_key(request_id)]


def _idempotency_key(tenant: str, key: str) -> str:
    # Hashed: both are any bytes of a client's choosing. Lengths are in it, so that no two pairs read alike.
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{key}".encode(), digest_size=16).hexdigest()
    return f"kvrelay:{{{digest}}}:idempotency"


def _changes(fields: Mapping[str, str | int]) -> Iterator[str | int]:
    for name, value in fields.items():
        assert name in CHANGEABLE_FIELDS, f"{name} does not change with a state"
        yield name
        yield value


def _accepted(request_id: str, result: bytes) -> bool:
    if result == b"LOST":
        raise StateLostError(f"The state store has lost the last writes about request {request_id}; restore it.")
    return result == b"DONE"


async def _read_record(client: Redis, request_id: str) -> tuple[dict[bytes, bytes], int]:
    pipeline = client.pipeline(transaction=False)
    pipeline.hgetall(_request_key(request_id))
    pipeline.time()
    stored, (seconds, microseconds) = await pipeline.execute()
    return stored, seconds * 1000 + microseconds // 1000
