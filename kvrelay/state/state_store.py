"""Request state in Redis: records, frame logs, the list of requests, idempotency keys.

Every operation is bounded by the timeout and raises:
    UnavailableError       Redis does not answer; while the breaker is open, at once
    StoreFullError         Redis is out of memory and evicts nothing
    UnreadableStateError   a key holds what kvrelay did not write
"""

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import structlog

from kvrelay.core.quoting import shortened
from kvrelay.core.request_state import (
    TERMINAL_STATES,
    RequestState,
    edges_argument,
    is_terminal,
    paths_argument,
    terminal_argument,
)
from kvrelay.core.trace_context import log_fields
from kvrelay.errors import (
    FrameGapError,
    IdempotencyConflictError,
    RequestNotFoundError,
    StateLostError,
    SupersededError,
    UnreadableStateError,
)
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_examination import execute
from kvrelay.state.request_list import RequestList, RequestPage
from kvrelay.state.request_record import (
    CHANGEABLE_FIELDS,
    RequestRecord,
    decode_record,
    decode_state,
    encode_record,
    forgotten_content,
)
from kvrelay.state.store_health import StoreHealth

RESTORED_FRAMES_PER_OPERATION = 1000
FOLLOW_MS = 5000
"""How long readers can find the end of an output that is not kept."""
CACHE_SECRET_MS = 3_600_000
"""How long the shared secret outlives the last gateway."""

_log = structlog.get_logger(__name__)


class StateStore:
    """`gateway_id` owns what this store creates.

    An ended request is kept for `retention_ms`, without its prompt and sampling.
    """

    def __init__(self, connection: RedisConnection, gateway_id: str, retention_ms: int = 600_000) -> None:
        self._connection = connection
        self._gateway_id = gateway_id
        self._retention_ms = retention_ms
        self._request_list = RequestList(connection)

    @property
    def healthy(self) -> bool:
        return self._connection.health.healthy

    @property
    def health(self) -> StoreHealth:
        return self._connection.health

    async def create(self, record: RequestRecord) -> bool:
        """Idempotent. False, without a change, if another attempt, state or owner has the id."""
        arguments = (
            record.gateway_id,
            record.create_time_ms,
            record.remaining_ms,
            self._retention_ms,
            *encode_record(record),
        )
        written = await self._connection.run_script("create", _keys_with_owner(record.request_id), arguments)
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
            new_attempt: `attempt + 1` for a retry, whose `to_state` is QUEUED.
            fields: `CHANGEABLE_FIELDS` to set with it.
            owner: expected owner; default this one.

        Returns False for a zombie: the request is final, further on, newer or of another owner.

        Raises:
            StateLostError: Redis lost writes of this owner; call `restore`.
        """
        forgotten = forgotten_content() if is_terminal(to_state) else {}
        arguments = (
            owner or self._gateway_id,
            attempt,
            to_state.value,
            attempt if new_attempt is None else new_attempt,
            self._retention_ms,
            edges_argument(),
            paths_argument(),
            terminal_argument(),
            FOLLOW_MS,
            *_changes(fields or {}),
            *chain.from_iterable(forgotten.items()),
        )
        return _accepted(request_id, await self._connection.run_script("transition", _keys(request_id), arguments))

    async def restore(self, record: RequestRecord, frames: Sequence[bytes]) -> bool:
        """Rewrites the owner's state after Redis lost a part. The attempt never goes back.

        False, without a change, for a newer attempt, a final state or another owner.
        """
        if is_terminal(record.state) and not record.keeps_output:
            frames = ()
        # Parts bound each operation. Until the last one, the request reads as running.
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
            FOLLOW_MS,
            len(fields),
            *fields,
            *frames,
        )
        return _accepted(
            record.request_id,
            await self._connection.run_script(
                "restore", [*_keys(record.request_id), owner_key(record.request_id)], arguments
            ),
        )

    async def append_frames(
        self,
        request_id: str,
        attempt: int,
        position: int,
        frames: Sequence[bytes],
        num_output_tokens: int | None = None,
    ) -> int:
        """Appends frames to a log, or none, skips those it has, and returns its new length.

        Raises:
            FrameGapError: frames before `position` are missing.
            StateLostError: the record is missing, or of an older attempt.
            SupersededError: the request is final, of a newer attempt or another owner.
        """
        output = "" if num_output_tokens is None else num_output_tokens
        arguments = (self._gateway_id, attempt, position, terminal_argument(), output, *frames)
        result, *details = await self._connection.run_script("append", _keys(request_id), arguments)
        if result == b"GAP":
            raise FrameGapError(
                f"The log of request {shortened(request_id)} ends before frame {position}; restore it.", int(details[0])
            )
        if not _accepted(request_id, result):
            raise SupersededError(f"Request {shortened(request_id)} has ended or goes on elsewhere.")
        return int(details[0])

    async def read_frames(
        self, request_id: str, position: int, max_count: int, wait_ms: int = 0
    ) -> tuple[list[bytes], RequestState]:
        """Reads frames from `position` on; waits up to `wait_ms` for the first one or the end.

        An ended request reads as DECODING until its last frames. RequestNotFoundError if it is
        unknown.
        """
        arguments = (position, max_count, terminal_argument())
        answer = await self._connection.run_script("read", _keys(request_id), arguments)
        if len(answer) == 1 and wait_ms > 0 and decode_state(answer[0]) not in TERMINAL_STATES:
            # Frame p has the stream id (p + 1)-0: this waits for frame `position` or the end.
            await self._connection.wait_for_entry(_log_key(request_id), f"{position}-0", wait_ms)
            answer = await self._connection.run_script("read", _keys(request_id), arguments)
        if not answer:
            raise RequestNotFoundError(f"Request {shortened(request_id)} is not known, or was forgotten.")
        return answer[1:], decode_state(answer[0])

    async def get(self, request_id: str) -> RequestRecord | None:
        now_ms, answer = await self._connection.run_script("record", [request_key(request_id)], ())
        return decode_record(dict(zip(answer[::2], answer[1::2], strict=True)), now_ms) if answer else None

    async def tenant_of(self, request_id: str) -> str | None:
        """None if the request is unknown."""
        tenant = await self._connection.run(lambda client: execute(client, "HGET", request_key(request_id), "tenant"))
        return None if tenant is None else tenant.decode(errors="replace")

    async def list_requests(
        self, page_size: int, page_token: str = "", active_only: bool = False, *, tenant: str | None = None
    ) -> RequestPage:
        """Newest first, of one tenant or, with None, of all.

        InvalidRequestError for a wrong `page_token`.
        """
        return await self._request_list.read_page(page_size, page_token, active_only, tenant)

    async def take_over(
        self, request_id: str, expected_owner: str, expected_attempt: int, token: str | None = None
    ) -> RequestRecord | None:
        """Gives a dead gateway's active request to this one: attempt + 1, QUEUED.

        A repeat with the same `token` succeeds too. None when the request is not as expected.
        """
        arguments = (
            expected_owner,
            expected_attempt,
            self._gateway_id,
            token or secrets.token_hex(8),
            terminal_argument(),
        )
        if not await self._connection.run_script("take_over", _keys_with_owner(request_id), arguments):
            return None
        record = await self.get(request_id)
        is_mine = record is not None and (record.gateway_id, record.attempt) == (self._gateway_id, expected_attempt + 1)
        return record if is_mine else None

    async def claim_idempotency_key(self, tenant: str, key: str, body_digest: str, request_id: str, ttl_ms: int) -> str:
        """Claims a tenant's key unless it is taken; returns the request that has it.

        Raises IdempotencyConflictError for another body.
        """
        answer = await self._connection.run_script(
            "claim", [_idempotency_key(tenant, key)], (body_digest, request_id, ttl_ms)
        )
        # A key that lacks a field counts as another body's.
        stored_digest, owner = ((value or b"").decode(errors="replace") for value in answer)
        if stored_digest != body_digest:
            raise IdempotencyConflictError("The idempotency key was used before with another request; use a new key.")
        return owner

    async def release_idempotency_key(self, tenant: str, key: str, request_id: str) -> None:
        """For a request that was not admitted."""
        await self._connection.run_script("release", [_idempotency_key(tenant, key)], (request_id,))

    async def share_cache_secret(self, secret: bytes) -> bytes:
        """Returns the secret of the cluster's gateways: the first one's, renewed by each call."""
        answer = await self._connection.run_script("cache_secret", [_CACHE_SECRET_KEY], (secret, CACHE_SECRET_MS))
        assert isinstance(answer, bytes), "the script returns what it stored"
        return answer

    async def exchange_usage(self, report: bytes, lifetime_ms: int) -> dict[str, bytes]:
        """Returns other gateways' reports."""
        arguments = (self._gateway_id, report, lifetime_ms)
        answer = await self._connection.run_script("usage", [_USAGE_KEY], arguments)
        return {name.decode(errors="replace"): data for name, data in zip(answer[::2], answer[1::2], strict=True)}

    async def _list(self, record: RequestRecord) -> None:
        time_to_live_ms = record.remaining_ms + self._retention_ms
        try:
            await self._request_list.add(record.request_id, record.tenant, record.create_time_ms, time_to_live_ms)
        except UnreadableStateError as error:
            about = log_fields(record.request_id, record.attempt, None)
            _log.error("a request is not in the list of requests", problem=repr(error.__cause__), **about)


_CACHE_SECRET_KEY = "kvrelay:{cache_secret}:gateways"
"""Outside of all that workers read: they see salts, and no secret or tenant."""


_USAGE_KEY = "kvrelay:{usage}:gateways"


def request_key(request_id: str) -> str:
    # Braces put both keys of a request into one slot of a cluster: scripts touch both.
    return f"kvrelay:{{{request_id}}}:request"


def _log_key(request_id: str) -> str:
    return f"kvrelay:{{{request_id}}}:log"


def owner_key(request_id: str) -> str:
    return f"kvrelay:{{{request_id}}}:owner"


def _keys_with_owner(request_id: str) -> list[str]:
    return [request_key(request_id), owner_key(request_id)]


def _keys(request_id: str) -> list[str]:
    return [request_key(request_id), _log_key(request_id)]


def _idempotency_key(tenant: str, key: str) -> str:
    # Hashed, because clients choose both. The length separates them.
    digest = hashlib.blake2b(f"{len(tenant)}:{tenant}{key}".encode(), digest_size=16).hexdigest()
    return f"kvrelay:{{{digest}}}:idempotency"


def _changes(fields: Mapping[str, str | int]) -> Iterator[str | int]:
    for name, value in fields.items():
        assert name in CHANGEABLE_FIELDS, f"{name} does not change with a state"
        yield name
        yield value


def _accepted(request_id: str, result: bytes) -> bool:
    if result == b"LOST":
        raise StateLostError(
            f"The state store has lost the last writes about request {shortened(request_id)}; restore it."
        )
    return result == b"DONE"
