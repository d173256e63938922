"""The lists of requests, newest first, by pages: one of all, and one of each tenant.

A sorted set has the ids by creation time. Requests expire by themselves; readers and writers remove
their ids.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from kvrelay.core.request_state import is_terminal
from kvrelay.errors import InvalidRequestError, UnreadableStateError
from kvrelay.state.redis_connection import RedisConnection
from kvrelay.state.redis_examination import execute
from kvrelay.state.redis_faults import fault_of
from kvrelay.state.request_record import SUMMARY_FIELDS, RequestSummary, decode_summary

LIST_KEY = "kvrelay:{requests}:by_create_time"
MAX_COUNTED_LISTS = 4096
ADDS_PER_CLEANING = 32
MAX_CLEANED = 2 * ADDS_PER_CLEANING
MAX_LOOKS_PER_PAGE = 4
READ_AT_ONCE = 50
"""Redis' answers to one batch are parsed without a pause."""
MAX_LISTED_MS = 10**15 - 1
"""Largest time of a page token."""
_TOKEN = re.compile(r"([0-9]{1,15})-(.{1,128})")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RequestPage:
    """May be short, even empty, and have a next one."""

    requests: list[RequestSummary]
    next_page_token: str
    """Empty on the last page."""


@dataclass(frozen=True, slots=True)
class _Position:
    """A page continues after it. Equal times are ordered by descending id."""

    create_time_ms: int
    request_id: str

    def precedes(self, other: "_Position") -> bool:
        return (self.create_time_ms, self.request_id) > (other.create_time_ms, other.request_id)


class RequestList:
    """Calls are bounded and raise as `RedisConnection.run`."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._num_added: Counter[str] = Counter()

    async def add(self, request_id: str, tenant: str, create_time_ms: int, time_to_live_ms: int) -> None:
        """Idempotent."""
        for key in (LIST_KEY, list_key_of(tenant)):
            await self._connection.run_script("index", [key], (create_time_ms, request_id, time_to_live_ms))
            if key not in self._num_added and len(self._num_added) >= MAX_COUNTED_LISTS:
                self._num_added.clear()
            self._num_added[key] += 1
            if self._num_added[key] % ADDS_PER_CLEANING == 0:
                await self._connection.run(partial(_clean, key=key))

    async def read_page(
        self, page_size: int, page_token: str, active_only: bool, tenant: str | None = None
    ) -> RequestPage:
        """See `StateStore.list_requests`."""
        key = LIST_KEY if tenant is None else list_key_of(tenant)
        position = _decode_token(page_token) if page_token else None
        found: list[RequestSummary] = []
        for _ in range(MAX_LOOKS_PER_PAGE):
            entries, summaries = await self._read_after(key, position, page_size)
            for entry, summary in zip(entries, summaries, strict=True):
                position = entry
                if summary is not None and not (active_only and is_terminal(summary.state)):
                    found.append(summary)
                    if len(found) == page_size:
                        return RequestPage(found, _encode_token(position))
            if len(entries) < page_size:
                return RequestPage(found, "")
        return RequestPage(found, _encode_token(position) if position else "")

    async def _read_after(
        self, key: str, position: _Position | None, count: int
    ) -> tuple[list[_Position], list[RequestSummary | None]]:
        entries = await self._connection.run(lambda client: _read_entries(client, key, position, count))
        if not entries:
            return [], []
        now_ms = await self._connection.run_script("clock", [key], ())
        summaries: list[RequestSummary | None] = []
        for begin in range(0, len(entries), READ_AT_ONCE):
            request_ids = [entry.request_id for entry in entries[begin : begin + READ_AT_ONCE]]
            summaries += await self._connection.run(
                partial(_read_summaries, key=key, request_ids=request_ids, now_ms=now_ms)
            )
        return entries, summaries


def list_key_of(tenant: str) -> str:
    # Hashed, because clients may choose it.
    digest = hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()
    return f"kvrelay:{{requests:{digest}}}:by_create_time"


async def _read_entries(client: Redis, key: str, position: _Position | None, count: int) -> list[_Position]:
    newest = "+inf" if position is None else position.create_time_ms
    entries: list[_Position] = []
    offset = 0
    while len(entries) < count:
        # Start with the position's whole millisecond: the page before may have ended within it.
        arguments = (key, newest, "-inf", "BYSCORE", "REV", "LIMIT", offset, count, "WITHSCORES")
        answer = await execute(client, "ZRANGE", *arguments)
        listed = [_Position(_milliseconds(score), _text(request_id)) for request_id, score in _pairs(answer)]
        entries += [entry for entry in listed if position is None or position.precedes(entry)]
        if len(listed) < count:
            break
        offset += count
    return entries[:count]


async def _read_summaries(
    client: Redis, key: str, request_ids: Sequence[str], now_ms: int
) -> list[RequestSummary | None]:
    pipeline = client.pipeline(transaction=False)
    for request_id in request_ids:
        pipeline.hmget(f"kvrelay:{{{request_id}}}:request", SUMMARY_FIELDS)
    # Errors of single keys are answers: a foreign value must not hide the other requests.
    answers = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, Exception) and not (isinstance(answer, ResponseError) and fault_of(answer) is None):
            raise answer  # no matter what the key holds
    summaries: list[RequestSummary | None] = []
    expired: list[str] = []
    for request_id, values in zip(request_ids, answers, strict=True):
        try:
            if isinstance(values, ResponseError):
                raise UnreadableStateError(str(values))
            summaries.append(decode_summary(values, now_ms))
        except UnreadableStateError as error:
            _log.warning(
                "unreadable request in the state store", request_id=request_id, problem=repr(error.__cause__ or error)
            )
            summaries.append(None)
        else:
            expired += [request_id] if summaries[-1] is None else []
    if expired:
        await execute(client, "ZREM", key, *expired)
    return summaries


async def _clean(client: Redis, key: str) -> None:
    oldest = await execute(client, "ZRANGE", key, 0, MAX_CLEANED - 1)
    await _read_summaries(client, key, [_text(request_id) for request_id in oldest], now_ms=0)


def _pairs(answer: Sequence[object]) -> list[tuple[object, str]]:
    # Some versions of redis-py pair ids and scores, others leave the answer flat.
    if answer and isinstance(answer[0], (tuple, list)):
        return [(entry[0], _text(entry[1])) for entry in answer if isinstance(entry, (tuple, list))]
    return [(answer[index], _text(answer[index + 1])) for index in range(0, len(answer), 2)]


def _milliseconds(score: str) -> int:
    return int(min(max(float(score), 0.0), MAX_LISTED_MS))


def _text(value: object) -> str:
    # Undecodable bytes are not our id, and their replacement names no request.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _encode_token(position: _Position) -> str:
    return f"{position.create_time_ms}-{position.request_id}"


def _decode_token(token: str) -> _Position:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise InvalidRequestError("page_token", "is none that this server gave; start again without one")
    return _Position(int(match[1]), match[2])
